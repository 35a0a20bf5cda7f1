"""Builds the native operators; all else is declared in pyproject.toml.

An extension is a shared library of operators that `vllm_quest/ops.py` loads. It uses no Python and
only PyTorch's stable ABI, so one build serves every later PyTorch and Python.

The environment may set:
    QUEST_CUDA_ARCHS: GPU architectures to compile for, such as "80 90", or "all". Unset, they are
        those of the GPUs found here; where none is found, only the CPU operators are built.
    CUDA_HOME: folder of the CUDA toolkit; empty: use none.
    CXX, CXXFLAGS: the C++ compiler and more flags for it.
    MAX_JOBS: compilers at a time.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest whose stable ABI has all we use
# PyTorch's own, by name: Pythons whose linker flags say -static-libstdc++ would give each operator
# library a second copy of it, which crashes when an error's message is put together.
SHARED_STDCXX = "-l:libstdc++.so.6"
STAGES = ("write_kv", "write_codes", "score", "score_codes", "select", "sparse_decode")
OBJECTS = ROOT / "build" / "objects"  # kept, so that a wheel compiles nothing twice
LIBRARIES = ("vllm_quest._C", "vllm_quest._C_cuda")
OLDEST_CUDA_ARCH = 80
ALL_CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
USUAL_CUDA_HOME = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Unit:
    """One source compiled once, unless an object of the same command is newer than its inputs."""

    source: Path
    variant: str
    command: tuple[str, ...]  # compiler and flags, but for source and output

    def compile(self) -> str:
        digest = hashlib.sha256("\0".join(self.command).encode()).hexdigest()[:12]
        output = OBJECTS / f"{self.variant}-{digest}" / self.source.with_suffix(".o")
        inputs = [ROOT / self.source, *(ROOT / CSRC).rglob("*.*h")]
        newest_input = max(path.stat().st_mtime for path in inputs)
        if not output.exists() or output.stat().st_mtime < newest_input:
            sys.stdout.write(f"compiling {self.source} ({self.variant})\n")
            sys.stdout.flush()
            output.parent.mkdir(parents=True, exist_ok=True)
            # Written under another name: a build that was stopped leaves no half of an object.
            partial = output.with_suffix(".partial")
            subprocess.run(
                [*self.command, "-c", str(ROOT / self.source), "-o", str(partial)], check=True
            )
            partial.rename(output)
        return str(output)


class NativeExtension(Extension):
    def __init__(self, name: str, units: list[Unit], link_flags: tuple[str, ...]) -> None:
        self.units = units
        self.link_flags = link_flags
        sources = sorted({str(unit.source) for unit in units})
        headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / CSRC).rglob("*.*h"))]
        super().__init__(name, sources, depends=headers, language="c++", py_limited_api=True)


class BuildNative(build_ext):
    def run(self) -> None:
        self.remove_others()
        super().run()

    def remove_others(self) -> None:
        """Remove what an earlier build left and this one does not make: a wheel would take it."""
        for name in {*LIBRARIES} - {ext.name for ext in self.extensions}:
            filename = self.get_ext_filename(name)
            Path(self.build_lib, filename).unlink(missing_ok=True)
            if self.inplace:
                (ROOT / filename).unlink(missing_ok=True)

    def build_extension(self, ext: NativeExtension) -> None:
        torch_lib = torch_dir() / "lib"
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 2))
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(Unit.compile, ext.units))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=[str(torch_lib)],
            extra_postargs=[*ext.link_flags, SHARED_STDCXX],
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


def cuda_archs() -> tuple[str, ...]:
    """The GPU architectures to compile for, oldest first: $QUEST_CUDA_ARCHS, or the GPUs here."""
    named = os.environ.get("QUEST_CUDA_ARCHS")
    if named is None:
        return found_archs()
    if named == "all":
        return ALL_CUDA_ARCHS
    archs = named.split()
    if not archs or not all(is_arch(arch) for arch in archs):
        raise SystemExit(
            f"QUEST_CUDA_ARCHS is {named!r}: expected architectures of {OLDEST_CUDA_ARCH} or more "
            f'in digits alone, such as "90" or "80 90", or "all" ({" ".join(ALL_CUDA_ARCHS)}); '
            "unset it to compile for the GPUs of this machine"
        )
    return sorted_archs(archs)


def found_archs() -> tuple[str, ...]:
    """The architectures of this machine's GPUs, without those too old for QUEST."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return sorted_archs(arch for line in lines if is_arch(arch := line.strip().replace(".", "")))


def is_arch(text: str) -> bool:
    return re.fullmatch(r"\d{2,3}", text) is not None and int(text) >= OLDEST_CUDA_ARCH


def sorted_archs(archs: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(archs), key=int))


def cuda_home() -> Path | None:
    """The CUDA toolkit of $CUDA_HOME (empty: none), of the nvcc on the PATH, or the usual one."""
    named = os.environ.get("CUDA_HOME")
    if named is not None:
        return Path(named).resolve() if named else None
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        settings = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
        ).stderr
        return Path(settings.partition("#$ TOP=")[2].splitlines()[0]).resolve()
    return USUAL_CUDA_HOME.resolve() if (USUAL_CUDA_HOME / "bin" / "nvcc").exists() else None


def check_toolkit(home: Path, archs: tuple[str, ...]) -> None:
    """Stop unless this CUDA toolkit compiles for all of `archs`."""
    command = [str(home / "bin" / "nvcc"), "--list-gpu-arch"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    known = answer.replace("compute_", "").split()
    if unknown := [arch for arch in archs if arch not in known]:
        raise SystemExit(
            f"The CUDA toolkit in {home} does not compile for {' '.join(unknown)}, only for "
            f"{' '.join(known)}: install a newer one, or set QUEST_CUDA_ARCHS"
        )


def cuda_extension(home: Path, archs: tuple[str, ...]) -> NativeExtension:
    """The GPU operators, for the newest architecture also as PTX, which later GPUs compile.

    They also link on a machine whose PyTorch is for CPUs.
    """
    check_toolkit(home, archs)
    host = (
        *os.environ.get("CXX", "c++").split(),
        *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden"),
        *(f"-isystem{home / 'include'}", "-DUSE_CUDA"),
        f'-DQUEST_CUDA_ARCHS="{" ".join(archs)}+PTX"',
        *torch_flags(),
    )
    device = (
        *(str(home / "bin" / "nvcc"), "-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
        f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}",
    )
    kernels = (
        *("write_kv", "write_codes", "score", "weigh_pages", "score_masses", "select"),
        *("sparse_decode", "cluster_decode/cluster_decode"),
        *("cluster_decode/cluster_decode_far_keys", "cluster_decode/cluster_decode_fp8"),
        "cluster_decode/cluster_decode_fp8_far_keys",
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
    archs = cuda_archs()
    home = cuda_home() if archs else None
    if home is not None:
        return [cpu_extension(), cuda_extension(home, archs)]
    if archs:
        missing = (
            f"The operators for GPUs of architecture {', '.join(archs)} need nvcc, which is not on "
            "the PATH: install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads), or "
            "set CUDA_HOME to its folder"
        )
        if "QUEST_CUDA_ARCHS" in os.environ:
            raise SystemExit(f"{missing}.")
        print(f"{missing}; then build again. Building the CPU operators alone.", file=sys.stderr)
    return [cpu_extension()]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
