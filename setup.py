"""Builds the native operators; all else is declared in pyproject.toml.

An extension is a shared library of operators that `vllm_quest/ops.py` loads. It uses no Python and
only PyTorch's stable ABI, so one build serves every later PyTorch and Python.
"""

import importlib.util
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest whose stable ABI has all we use
CPU_STAGES = ("write_kv", "score", "select", "sparse_decode")


@dataclass(frozen=True)
class Unit:
    """One source compiled once. `variant` tells apart the objects of a source."""

    source: Path
    variant: str
    command: tuple[str, ...]  # compiler and flags, but for source and output

    def compile(self, build_dir: Path) -> str:
        output = build_dir / self.variant / self.source.with_suffix(".o")
        inputs = [ROOT / "setup.py", *(path for path in (ROOT / CSRC).rglob("*") if path.is_file())]
        newest_input = max(path.stat().st_mtime for path in inputs)
        if not output.exists() or output.stat().st_mtime < newest_input:
            output.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                [*self.command, "-c", str(ROOT / self.source), "-o", str(output)], check=True
            )
        return str(output)


class NativeExtension(Extension):
    def __init__(self, name: str, units: list[Unit]) -> None:
        self.units = units
        sources = sorted({str(unit.source) for unit in units})
        headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / CSRC).rglob("*.h"))]
        super().__init__(name, sources, depends=headers, language="c++", py_limited_api=True)


class BuildNative(build_ext):
    def build_extension(self, ext: NativeExtension) -> None:
        torch_lib = torch_dir() / "lib"
        jobs = int(os.environ.get("MAX_JOBS", 2))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda unit: unit.compile(Path(self.build_temp)), ext.units))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu"],
            library_dirs=[str(torch_lib)],
            target_lang="c++",
        )


def torch_dir() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "vllm-quest builds against the PyTorch that vLLM runs on: install vLLM first, then "
            "run `pip install --no-build-isolation vllm-quest` (or `.`)."
        )
    return Path(spec.submodule_search_locations[0])


def torch_flags() -> tuple[str, ...]:
    """For sources that speak to PyTorch; empty where only metadata is asked for."""
    if importlib.util.find_spec("torch") is None:
        return ()
    return (
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f"-isystem{torch_dir() / 'include'}",
    )


def cpu_extension() -> NativeExtension:
    compiler = (
        *os.environ.get("CXX", "c++").split(),
        *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden"),
        *("-fno-math-errno", "-fno-trapping-math"),
        *os.environ.get("CXXFLAGS", "").split(),
    )
    variants = {"baseline": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        variants["x86_64_v3"] = ("-march=x86-64-v3",)
        variants["x86_64_v4"] = ("-march=x86-64-v4",)
    with_torch = ("bindings.cpp", "cpu/dispatch.cpp", "cpu/host.cpp")
    units = [Unit(CSRC / source, "torch", (*compiler, *torch_flags())) for source in with_torch]
    units += [
        Unit(CSRC / "cpu" / f"{stage}.cpp", isa, (*compiler, *flags, f"-DQUEST_ISA={isa}"))
        for isa, flags in variants.items()
        for stage in CPU_STAGES
    ]
    return NativeExtension("vllm_quest._C", units)


setup(
    ext_modules=[cpu_extension()],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
