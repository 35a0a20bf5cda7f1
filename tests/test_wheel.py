"""A wheel serves where there is no compiler and no source.

The environment is a fresh one: the wheel in it, and beside it what the tests' own environment has
(vLLM and what it needs; its editable vllm-quest comes later on the path). The wheel holds what is
compiled here; for all GPUs, which is `make wheel`, it weighs 16.4 MB (nvcc 13.0).
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from vllm_quest.pass_keys import make_haystack

ROOT = Path(__file__).parents[1]
TOOLS = ("lscpu", "uname")
"""What vLLM itself runs to learn about a machine."""

COMPILERS = ("c++", "g++", "gcc", "cc", "clang++", "nvcc")
RUN = """
import json
import sys
from pathlib import Path

import vllm_quest
from vllm import LLM, SamplingParams

package = Path(vllm_quest.__file__).parent
llm = LLM(
    str(package / "demo_model"), attention_backend="QUEST", enforce_eager=True,
    additional_config={"quest": {"dense_layers": 0, "token_budget": 256}},
    kv_cache_memory_bytes=1 << 28,
)
[result] = llm.generate(sys.argv[1], SamplingParams(temperature=0, max_tokens=5))
print(json.dumps([str(package), result.outputs[0].text]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"),
        *("--wheel-dir", str(folder), str(ROOT)),
    )
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", str(python)),
        *("install", "--no-deps", "--no-index", str(wheel)),
        cwd=folder,
    )
    site_packages = Path(sysconfig.get_path("purelib"))
    [own] = folder.glob("lib/python*/site-packages")
    # This folder goes to the path's end, and the .pth files in it stay unread.
    (own / "vllm.pth").write_text(f"{site_packages}\n")
    for tool in TOOLS:
        if program := shutil.which(tool):
            (python.parent / tool).symlink_to(program)
    return python


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints; it finds no package through PYTHONPATH."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]
    return process.stdout


def test_the_wheel_holds_operators_and_model(wheel):
    assert "-cp311-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("_C.abi3.so", "demo_model/model.safetensors", "py.typed"):
        assert f"vllm_quest/{name}" in names
    assert not any(name.endswith((".cpp", ".cu", ".o")) for name in names)


def test_the_wheel_serves_without_compilers(python, tmp_path):
    assert not any(shutil.which(name, path=str(python.parent)) for name in COMPILERS)
    haystack = make_haystack(1000, 8, seed=0)
    fact = haystack.facts[3]
    prompt = f"{haystack.text} {fact.sentence.removesuffix(f' {fact.code}.')}"
    output = run(str(python), "-c", RUN, prompt, cwd=tmp_path, PATH=str(python.parent))
    package, answer = json.loads(output.splitlines()[-1])
    assert python.parents[1] in Path(package).parents
    assert answer.strip() == fact.code
