"""Finds and loads the compiled operators: `_C` for CPUs (and all schemas), `_C_cuda` for GPUs."""

import functools
import struct
from pathlib import Path

import torch

OLDEST_ARCH = 80
"""GPUs of compute capability 8.0 and later can run the operators; `setup.py` says so too."""

LIBRARIES = {"cpu": "_C.abi3.so", "cuda": "_C_cuda.abi3.so"}
BUILD = "pip install --no-build-isolation -e . (in the repository of vllm-quest)"


def library(device: str) -> Path:
    """Path of a device's operators, whether or not they were built."""
    return Path(__file__).with_name(LIBRARIES[device])


def build_command(gpu_arch: int | None = None) -> str:
    """The command that compiles the operators, for a GPU if its architecture is given."""
    return BUILD if gpu_arch is None else f"QUEST_CUDA_ARCHS={gpu_arch} {BUILD}"


def why_missing(device: str, gpu: int = 0) -> str | None:
    """Why a device's operators cannot be used and what to do; None if they can.

    Args:
        device: "cpu" or "cuda".
        gpu: which of the visible GPUs, if `device` is "cuda".
    """
    gpu_arch = arch_of(gpu) if device == "cuda" else None
    needs = " with nvcc" if device == "cuda" else ""
    build = f"build them{needs}: {build_command(gpu_arch)}"
    if not library(device).exists():
        return f"the operators for {device} are not compiled; {build}"
    try:
        archs = compiled_for(device)
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]  # PyTorch hides the loader's words
        return f"the operators for {device} do not load ({reason}); {build}"
    if gpu_arch is not None and not runs_on(archs, gpu_arch):
        return f"the operators for cuda hold code for {archs}, not for sm_{gpu_arch}; {build}"
    return None


def arch_of(gpu: int) -> int:
    """The architecture of a visible GPU: 90 for compute capability 9.0. CUDA stays uninitialised.

    Raises:
        RuntimeError: vLLM finds no such GPU.
    """
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability(gpu)
    if capability is None:
        raise RuntimeError(f"vLLM finds no GPU {gpu}")
    return int(capability.to_int())


def runs_on(archs: str, gpu_arch: int) -> bool:
    """Whether operators compiled for `archs`, such as "80 90+PTX", run on a GPU.

    A GPU runs machine code of its own major version and its own minor version or an older one; from
    PTX of any older or equal version the driver compiles (CUDA programming guide, "Compute
    capability and streaming multiprocessor versions" and "PTX compatibility").
    """
    binaries = [int(arch) for arch in archs.removesuffix("+PTX").split()]
    from_ptx = archs.endswith("+PTX") and binaries[-1] <= gpu_arch
    return from_ptx or any(arch // 10 == gpu_arch // 10 and arch <= gpu_arch for arch in binaries)


@functools.cache
def load(device: str) -> None:
    """Register a device's operators with PyTorch as `torch.ops.vllm_quest.*`.

    Raises:
        OSError: the library is missing, cut off, or does not fit the installed PyTorch.
    """
    if device != "cpu":
        load("cpu")
    path = library(device)
    if is_cut_off(path):
        raise OSError(f"{path} is cut off")
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


def is_cut_off(path: Path) -> bool:
    """Whether a library ends before its own table of sections does, as after half a copy.

    The loader would map pages behind its end, and the process die of a bus error.

    Raises:
        OSError: there is no such file.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":  # no 64-bit library: the loader says so
        return False
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_bytes, num_entries = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < int(table + entry_bytes * num_entries)


def compiled_for(device: str) -> str:
    """What the operators hold code for.

    CPU: the instruction sets that this machine can run. GPU: architectures, oldest first, and
    "+PTX" if the last is also held as PTX.
    """
    load(device)
    isas = torch.ops.vllm_quest.cpu_isas if device == "cpu" else torch.ops.vllm_quest.cuda_archs
    return str(isas())
