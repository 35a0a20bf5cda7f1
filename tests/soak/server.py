"""A server as users start it, its memory and its metrics."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from servers import free_port, start, stop

DEMO_MODEL = Path(__file__).parents[2] / "vllm_quest" / "demo_model"
QUEST = {"token_budget": 512, "dense_layers": 1}
LAYERS, KV_HEADS = 4, 2
"""Of the bundled model."""

ENDS_BY_ITSELF_S = 20


@dataclass
class Server:
    """`vllm serve` with QUEST on the bundled model."""

    log: IO[bytes]
    options: list[str] = field(default_factory=list)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    temporary: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="soak-")
    )
    """What the server takes for the system's temporary folder."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Start it and wait until it is healthy; returns how long that took, in seconds.

        Raises:
            RuntimeError: it ended, or did not become healthy in time.
        """
        self.port = self.port or free_port()
        arguments = [str(DEMO_MODEL), "--attention-backend", "QUEST"]
        arguments += ["--additional-config", json.dumps({"quest": QUEST}), *self.options]
        begun = time.monotonic()
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
        environment["TMPDIR"] = self.temporary.name
        self.process = start(arguments, self.port, env=environment, log=self.log)
        return time.monotonic() - begun

    def is_up(self) -> bool:
        """Whether its first process runs."""
        return self.process is not None and self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """The server's processes."""
        assert self.process is not None
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def metrics_folders(self) -> list[str]:
        """Folders for its metrics, which one that is killed leaves to the next."""
        return [path.name for path in Path(self.temporary.name).glob("vllm-quest-metrics-*")]

    def rss_mib(self) -> float:
        """Resident memory of all its processes."""
        total = 0
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 2**20

    def kill(self) -> list[str]:
        """`kill -9` its first process; returns the names of those that do not end by themselves.

        vLLM's engine does not, with any attention backend, and is killed as well.
        """
        family = self.family()
        assert self.process is not None
        os.kill(family[0].pid, signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=ENDS_BY_ITSELF_S)
        names = [process.name() for process in alive]
        for process in alive:
            process.kill()
        psutil.wait_procs(alive)
        return names

    def stop(self) -> None:
        """As Ctrl-C does."""
        if self.process is not None:
            stop(self.process)

    def metrics(self) -> dict[str, float]:
        """Counters by name, and by name and finished_reason where they have one."""
        lines = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        values: dict[str, float] = {}
        for line in lines.splitlines():
            if line.startswith("vllm:"):
                sample, _, value = line.rpartition(" ")
                name, _, labels = sample.partition("{")
                values[name] = values.get(name, 0) + float(value)
                if 'finished_reason="' in labels:
                    reason = labels.partition('finished_reason="')[2].partition('"')[0]
                    key = f"{name} {reason}"
                    values[key] = values.get(key, 0) + float(value)
        return values


def gpu_mib(processes: Collection[int]) -> float | None:
    """Memory on GPUs of these processes; None where there is no GPU.

    Where the driver does not tell processes apart, all that is in use on the first GPU.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    lines = _nvidia_smi("--query-compute-apps=pid,used_gpu_memory")
    used = [line.split(", ") for line in lines]
    own = [float(mib) for pid, mib in used if int(pid) in processes and mib.isdecimal()]
    if own:
        return sum(own)
    return next(map(float, _nvidia_smi("--query-gpu=memory.used")), None)


def _nvidia_smi(query: str) -> list[str]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.stdout.splitlines() if process.returncode == 0 else []
