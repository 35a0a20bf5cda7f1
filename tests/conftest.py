"""Fixtures shared by all tests. vLLM runs for real; engines live in the test's own process."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two threads, so that races can show; an idle one leaves its core to the other workers.
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import pytest
import torch
from vllm.plugins import load_general_plugins

DEMO_MODEL = Path(__file__).parents[1] / "vllm_quest" / "demo_model"
MAX_WORKERS = 8
"""A worker and the processes of its test take up to 4 GiB."""

# `LLM(attention_config=...)` and backend names in tests are parsed before vLLM loads plugins.
load_general_plugins()


def pytest_xdist_auto_num_workers() -> int:
    """How many workers `make test` starts: one per core; none on a GPU.

    vLLM's measurement of free GPU memory fails where another engine stops at that moment.
    """
    return 0 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), MAX_WORKERS)


@pytest.fixture(scope="session")
def demo_model() -> str:
    """Path of the bundled model."""
    return str(DEMO_MODEL)
