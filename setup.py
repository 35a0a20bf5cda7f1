"""Builds the native operators; all else is declared in pyproject.toml.

An extension is a shared library of operators that `vllm_quest/ops.py` loads. It uses no Python and
only PyTorch's stable ABI, so one build serves every later PyTorch and Python.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest whose stable ABI has all we use
STAGES = ("write_kv", "score", "select", "sparse_decode")
CUDA_ARCHS = os.environ.get("QUEST_CUDA_ARCHS", "80 86 89 90 100 120").split()  # the last also PTX


@dataclass(frozen=True)
class Unit:
    """One source compiled once. `variant` tells apart the objects of a source."""

    source: Path
    variant: str
    command: tuple[str, ...]  # compiler and flags, but for source and output

    def compile(self, build_dir: Path) -> str:
        output = build_dir / self.variant / self.source.with_suffix(".o")
        inputs = [ROOT / "setup.py", ROOT / self.source, *(ROOT / CSRC).rglob("*.*h")]
        newest_input = max(path.stat().st_mtime for path in inputs)
        if not output.exists() or output.stat().st_mtime < newest_input:
            output.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                [*self.command, "-c", str(ROOT / self.source), "-o", str(output)], check=True
            )
        return str(output)


class NativeExtension(Extension):
    def __init__(self, name: str, units: list[Unit], link_flags: tuple[str, ...]) -> None:
        self.units = units
        self.link_flags = link_flags
        sources = sorted({str(unit.source) for unit in units})
        headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / CSRC).rglob("*.*h"))]
        super().__init__(name, sources, depends=headers, language="c++", py_limited_api=True)


class BuildNative(build_ext):
    def build_extension(self, ext: NativeExtension) -> None:
        torch_lib = torch_dir() / "lib"
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 2))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda unit: unit.compile(Path(self.build_temp)), ext.units))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=[str(torch_lib)],
            extra_postargs=list(ext.link_flags),
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
    variants: dict[str, tuple[str, ...]] = {"baseline": ()}
    if platform.machine() in ("x86_64", "AMD64"):
        variants["x86_64_v3"] = ("-march=x86-64-v3",)
        variants["x86_64_v4"] = ("-march=x86-64-v4",)
    with_torch = ("bindings.cpp", "cpu/dispatch.cpp", "cpu/host.cpp")
    units = [Unit(CSRC / source, "torch", (*compiler, *torch_flags())) for source in with_torch]
    units += [
        Unit(CSRC / "cpu" / f"{stage}.cpp", isa, (*compiler, *flags, f"-DQUEST_ISA={isa}"))
        for isa, flags in variants.items()
        for stage in STAGES
    ]
    return NativeExtension("vllm_quest._C", units, ("-ltorch_cpu",))


def cuda_home() -> Path | None:
    """The CUDA toolkit of $CUDA_HOME (empty: none), or else of the nvcc on the PATH."""
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME")
    if home is None and nvcc is not None:
        home = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
        ).stderr.partition("#$ TOP=")[2]
    return Path(home.splitlines()[0]).resolve() if home else None


def cuda_extension(home: Path) -> NativeExtension:
    """The GPU operators. They also link on a machine whose PyTorch is for CPUs."""
    host = (
        *os.environ.get("CXX", "c++").split(),
        *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden"),
        *(f"-isystem{home / 'include'}", "-DUSE_CUDA"),
        f'-DQUEST_CUDA_ARCHS="{" ".join(CUDA_ARCHS)}+PTX"',
        *torch_flags(),
    )
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
    ptx = f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}"
    device = (
        *(str(home / "bin" / "nvcc"), "-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"),
        *(*archs, ptx),
    )
    kernels = (
        *STAGES,
        "cluster_decode/cluster_decode",
        "cluster_decode/cluster_decode_far_keys",
    )
    units = [Unit(CSRC / "cuda" / f"{kernel}.cu", "cuda", device) for kernel in kernels]
    units.append(Unit(CSRC / "cuda" / "bindings.cpp", "cuda", host))
    return NativeExtension(
        "vllm_quest._C_cuda",
        units,
        # libtorch brings in its CUDA part, where the current stream is found.
        (
            *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"),
            *(f"-L{home / 'lib64'}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"),
        ),
    )


def extensions() -> list[NativeExtension]:
    home = cuda_home()
    return [cpu_extension()] if home is None else [cpu_extension(), cuda_extension(home)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
