"""`vllm serve` as users start it, on a port of its own."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
START_LIMIT_S = 300
PORTS = range(10000, 16000)
"""Below those that kernels hand out (Linux from 32768 on, gVisor from 16000 on): between its choice
and the server's start no other process is given such a port."""

LAST_LINES = 40


def free_port() -> int:
    """A port of this host on which nobody listens."""
    while True:
        port = secrets.choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def start(
    arguments: Sequence[str],
    port: int,
    *,
    env: dict[str, str] | None = None,
    log: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """A healthy `vllm serve`, in this process's environment with `env` on top.

    Its output goes to `log`, a file, or where this process's goes.

    Raises:
        RuntimeError: it ended, or was not healthy in time; with the last lines of `log`.
    """
    process = subprocess.Popen(
        [*SERVE, *arguments, "--port", str(port)],
        env=os.environ | (env or {}),
        stdout=log,
        stderr=log and subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                return process
            time.sleep(0.5)
        why = "was not healthy in time" if process.returncode is None else "ended"
        lines = Path(log.name).read_text(errors="replace").splitlines() if log else []
        raise RuntimeError("\n".join([f"the server {why}", *lines[-LAST_LINES:]]))
    except BaseException:
        stop(process)
        raise


def stop(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does."""
    process.terminate()
    process.wait()


@contextlib.contextmanager
def serve(
    model: str, *options: str, env: dict[str, str] | None = None, log: IO[bytes] | None = None
) -> Iterator[str]:
    """The URL of a server; see `start`."""
    port = free_port()
    process = start([model, *options], port, env=env, log=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)
