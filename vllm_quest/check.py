"""`vllm-quest check`: what was found on this machine, what works, and what to do about the rest."""

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vllm_quest import __version__


@dataclass(frozen=True)
class Finding:
    """One line of the report. `cure` says what to do, and is None where all is well."""

    subject: str
    found: str
    cure: str | None = None


def run_check() -> int:
    """Print the report. Returns 0 if QUEST can serve here, else 1."""
    from vllm_quest import extension

    findings = [*_software(), *_device(), *_operators(), _registration(), _budgets(), _demo_model()]
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = "ok" if finding.cure is None else "--"
        print(f"{mark}  {finding.subject:<{width}}  {finding.found}")
        if finding.cure is not None:
            print(f"    {'':<{width}}  -> {finding.cure}")
    healthy = all(finding.cure is None for finding in findings)
    print(
        f"\nTo build for GPUs of compute capability 9.0, with nvcc: {extension.build_command(90)}"
    )
    print(
        "QUEST can serve here: vllm serve MODEL --attention-backend QUEST"
        if healthy
        else "QUEST cannot serve here yet: see the lines marked with --"
    )
    return 0 if healthy else 1


def _software() -> list[Finding]:
    from vllm_quest.support import VLLM_WANTED, fits_vllm

    cure = f"pip install '{VLLM_WANTED}'"
    findings = [Finding("vllm-quest", f"{__version__}, Python {platform.python_version()}")]
    try:
        installed = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [*findings, Finding("vLLM", "not installed", cure)]
    findings.append(Finding("vLLM", installed, None if fits_vllm(installed) else cure))
    findings.append(Finding("torch", metadata.version("torch")))
    return findings


def _device() -> list[Finding]:
    import torch
    from vllm.platforms import current_platform

    from vllm_quest import extension

    if not current_platform.is_cuda():
        return [Finding("device", f"CPU: {_processor()}, {os.cpu_count()} cores")]
    return [
        Finding(
            f"GPU {gpu}",
            f"{torch.cuda.get_device_name(gpu)}, sm_{extension.arch_of(gpu)}",
            None
            if extension.arch_of(gpu) >= extension.OLDEST_ARCH
            else "QUEST needs compute capability 8.0: hide this GPU with CUDA_VISIBLE_DEVICES",
        )
        for gpu in range(torch.cuda.device_count())
    ]


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _operators() -> list[Finding]:
    from vllm.platforms import current_platform

    from vllm_quest import extension

    missing = extension.why_missing("cpu")
    found = "missing" if missing else extension.compiled_for("cpu")
    findings = [Finding("operators for cpu", found, missing)]
    if not current_platform.is_cuda():
        return [*findings, Finding("operators for cuda", _cuda_operators_without_gpu())]
    for gpu in range(current_platform.device_count()):
        if extension.arch_of(gpu) < extension.OLDEST_ARCH:
            continue
        missing = extension.why_missing("cuda", gpu)
        if not extension.library("cuda").exists():
            found = "not built: no GPU, or no nvcc, was found when the package was built"
        else:
            found = "not for this GPU" if missing else extension.compiled_for("cuda")
        findings.append(Finding(f"operators for GPU {gpu}", found, missing))
    return findings


def _cuda_operators_without_gpu() -> str:
    from vllm_quest import extension

    if extension.library("cuda").exists():
        return "built; there is no GPU here to run them on"
    return "not built: no GPU was found when the package was built"


def _registration() -> Finding:
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_quest import plugin

    load_general_plugins()
    if plugin.NAME in AttentionBackendEnum.__members__:
        return Finding("vLLM plugin", "the attention backend QUEST is registered")
    return Finding(
        "vLLM plugin",
        "vLLM did not load it",
        "unset VLLM_PLUGINS, or add 'quest' to it; else reinstall vllm-quest"
        if os.environ.get("VLLM_PLUGINS") is not None
        else "reinstall vllm-quest",
    )


def _budgets() -> Finding:
    from vllm_quest.budgets import FIELD

    names = [entry.name for entry in metadata.entry_points(group="vllm.logits_processors")]
    if "quest_budget" in names:
        return Finding("per-request budgets", f'"vllm_xargs": {{"{FIELD}": 1024}}')
    return Finding("per-request budgets", "not registered", "reinstall vllm-quest")


def _demo_model() -> Finding:
    weights = Path(__file__).parent / "demo_model" / "model.safetensors"
    if weights.exists():
        return Finding("bundled model", f"{weights.stat().st_size / 1e6:.1f} MB: vllm-quest demo")
    return Finding("bundled model", "missing", "reinstall vllm-quest")
