"""A broken vllm-quest leaves engines alone that do not use QUEST, and tells those that do.

The package is copied, truly broken, and put where Python finds it first.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_quest
from engines import DENSE, ON_GPU, generate, greedy, random_prompts, write_model, write_weights

CAUSE = "broken by a test"
BREAKS = {
    "registration": ("plugin.py", f"\n\ndef _register():\n    raise OSError('{CAUSE}')\n"),
    "budgets": ("budgets.py", f"\nraise OSError('{CAUSE}')\n"),
}
RUN = """
import sys
from vllm import LLM, SamplingParams
from engines import ON_GPU, greedy, random_prompts, token_ids
llm = LLM(
    sys.argv[1], attention_backend=sys.argv[2], enforce_eager=True, skip_tokenizer_init=True,
    kv_cache_memory_bytes=1 << 28, gpu_memory_utilization=0.15 if ON_GPU else 0.9,
    dtype="bfloat16" if ON_GPU else "float32",
)
print(token_ids(llm, random_prompts([5, 200]), greedy(8)))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_weights(write_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(params=BREAKS)
def run_broken(request, tmp_path, model):
    """Runs an engine of a given backend with the package broken in one way."""
    package = Path(vllm_quest.__file__).parent
    ignore = shutil.ignore_patterns("demo_model", "__pycache__")
    shutil.copytree(package, tmp_path / "vllm_quest", ignore=ignore)
    module, damage = BREAKS[request.param]
    with (tmp_path / "vllm_quest" / module).open("a") as file:
        file.write(damage)
    path = [str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}

    def run(backend: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", RUN, model, backend]
        return subprocess.run(
            arguments, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


@pytest.fixture(scope="module")
def dense_tokens(model):
    answers = generate(model, random_prompts([5, 200]), greedy(8), backend=DENSE)
    return [list(answer.tokens) for answer in answers]


def test_other_backends_go_on(run_broken, dense_tokens):
    process = run_broken(DENSE)
    assert process.returncode == 0, process.stderr[-3000:]
    assert ON_GPU or process.stdout.splitlines()[-1] == str(dense_tokens)
    output = process.stdout + process.stderr
    [line] = [line for line in output.splitlines() if CAUSE in line]
    assert "QUEST is not available" in line


def test_quest_fails_with_the_cause(run_broken):
    process = run_broken("QUEST")
    assert process.returncode != 0
    lines = (process.stdout + process.stderr).splitlines()
    assert any("QUEST" in line and CAUSE in line for line in lines), process.stderr[-3000:]
    assert not any("EngineCore" in line for line in lines)
