"""Finds and loads the compiled operators: `_C` for CPUs (and all schemas), `_C_cuda` for GPUs."""

import functools
from pathlib import Path

import torch

LIBRARIES = {"cpu": "_C.abi3.so", "cuda": "_C_cuda.abi3.so"}
BUILD = "pip install --no-build-isolation -e . (in the repository of vllm-quest)"


def library(device: str) -> Path:
    """Path of a device's operators, whether or not they were built."""
    return Path(__file__).with_name(LIBRARIES[device])


def why_missing(device: str) -> str | None:
    """Why a device's operators cannot be used and what to do; None if they can."""
    if not library(device).exists():
        needs = " with nvcc on the PATH" if device == "cuda" else ""
        return f"the operators for {device} are not compiled; build them{needs}: {BUILD}"
    try:
        load(device)
    except OSError as error:
        reason = str(error).splitlines()[0]
        return f"the operators for {device} do not load ({reason}); rebuild them: {BUILD}"
    return None


@functools.cache
def load(device: str) -> None:
    """Register a device's operators with PyTorch as `torch.ops.vllm_quest.*`.

    Raises:
        OSError: the library is missing or does not fit the installed PyTorch.
    """
    if device != "cpu":
        load("cpu")
    torch.ops.load_library(str(library(device)))  # type: ignore[no-untyped-call]


def compiled_for(device: str) -> str:
    """The instruction sets (CPU: those this machine can run) that the operators hold code for."""
    load(device)
    isas = torch.ops.vllm_quest.cpu_isas if device == "cpu" else torch.ops.vllm_quest.cuda_archs
    return str(isas())
