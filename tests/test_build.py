"""For which GPUs the operators are compiled, what is said where they cannot be, and who runs them.

An `nvidia-smi` and a CUDA toolkit of the tests' own stand in for the machine's.
"""

import re
import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest
import setuptools
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from vllm_quest import extension

ROOT = Path(__file__).parents[1]
ALL = ["80", "86", "89", "90", "100", "120"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a machine of GPUs with or without a CUDA toolkit, and plans a build on it.

    The plan lists the architectures to compile for, and the last again if also as PTX; it is None
    where the operators for GPUs are left out.
    """

    def plan(
        capabilities: Sequence[str] = (), *, toolkit: bool = True, archs: str | None = None
    ) -> list[str] | None:
        write_program(tmp_path / "bin" / "nvidia-smi", capabilities)
        write_program(tmp_path / "bin" / "nvcc", [f"compute_{arch}" for arch in ["75", *ALL]])
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path) if toolkit else "")
        monkeypatch.delenv("QUEST_CUDA_ARCHS", raising=False)
        if archs is not None:
            monkeypatch.setenv("QUEST_CUDA_ARCHS", archs)
        given = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
        cpu, *cuda = given["ext_modules"]
        assert cpu.name == "vllm_quest._C"
        if not cuda:
            return None
        [compilers] = {unit.command for unit in cuda[0].units if unit.source.suffix == ".cu"}
        return re.findall(r"code=(?:sm|compute)_(\d+)", " ".join(compilers))

    return plan


def write_program(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *(f"echo {line}" for line in lines), ""]))
    path.chmod(0o755)


def test_without_a_gpu_none_is_compiled_for(machine):
    assert machine([]) is None


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [
        (["9.0"], ["90", "90"]),
        (["9.0", "8.0", "9.0"], ["80", "90", "90"]),
        (["12.0", "7.5"], ["120", "120"]),
        (["7.5"], None),
        (["[N/A]"], None),
    ],
)
def test_the_gpus_found_are_compiled_for(machine, capabilities, archs):
    assert machine(capabilities) == archs


@pytest.mark.parametrize(
    ("named", "archs"),
    [("90", ["90", "90"]), ("100 90 80", ["80", "90", "100", "100"]), ("all", [*ALL, ALL[-1]])],
)
def test_named_architectures_need_no_gpu(machine, named, archs):
    assert machine(archs=named) == archs
    assert machine(["8.6"], archs=named) == archs


@pytest.mark.parametrize("named", ["9.0", "sm_90", "90a", "banana", "", "75", "all 90"])
def test_a_bad_name_is_refused_in_one_line(machine, named):
    with pytest.raises(SystemExit) as refusal:
        machine(archs=named)
    message = str(refusal.value)
    assert message.startswith(f"QUEST_CUDA_ARCHS is {named!r}: expected")
    assert '"80 90"' in message and '"all"' in message and "\n" not in message


def test_a_gpu_without_a_toolkit_gets_a_notice(machine, capsys):
    assert machine(["9.0"], toolkit=False) is None
    notice = capsys.readouterr().err
    assert "architecture 90 need nvcc" in notice
    assert "cuda-downloads" in notice and "CUDA_HOME" in notice


def test_named_architectures_without_a_toolkit_are_refused(machine):
    with pytest.raises(SystemExit, match="architecture 80, 90 need nvcc"):
        machine(archs="80 90", toolkit=False)


def test_a_toolkit_that_is_too_old_is_refused(machine):
    with pytest.raises(SystemExit, match="does not compile for 130, only for 75 80"):
        machine(["13.0"])


@pytest.mark.parametrize(
    ("archs", "gpu_arch", "runs"),
    [
        ("90+PTX", 90, True),
        ("80 90+PTX", 86, True),
        ("86 90+PTX", 80, False),
        ("90+PTX", 89, False),
        ("80+PTX", 90, True),
        ("80 90+PTX", 120, True),
        ("100 120+PTX", 103, True),
        ("100 120+PTX", 90, False),
    ],
)
def test_which_gpus_compiled_operators_run_on(archs, gpu_arch, runs):
    assert extension.runs_on(archs, gpu_arch) == runs


@pytest.mark.parametrize(
    ("exists", "archs", "found"),
    [
        (False, "", "not compiled"),
        (True, "90+PTX", "hold code for 90+PTX, not for sm_86"),
        (True, "80 90+PTX", None),
    ],
)
def test_a_gpu_without_code_is_told_the_cure(monkeypatch, tmp_path, exists, archs, found):
    library = tmp_path / "_C_cuda.abi3.so"
    if exists:
        library.touch()
    capability = DeviceCapability(8, 6)
    monkeypatch.setattr(extension, "library", lambda _device: library)
    monkeypatch.setattr(extension, "compiled_for", lambda _device: archs)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda _gpu: capability)
    missing = extension.why_missing("cuda")
    if found is None:
        assert missing is None
    else:
        assert found in missing and "QUEST_CUDA_ARCHS=86 pip install" in missing


@pytest.mark.parametrize("device", extension.LIBRARIES)
def test_the_operators_share_the_c_plus_plus_library_of_pytorch(device):
    """A copy of their own crashed, on some Pythons, wherever an operator refused a number."""
    library = extension.library(device)
    if not library.exists():
        pytest.skip(f"the operators for {device} are not built")
    assert b"libstdc++.so.6" in library.read_bytes()
