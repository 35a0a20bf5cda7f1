"""Fixtures shared by all tests. vLLM runs for real; engines live in the test's own process."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from pathlib import Path

import pytest
from vllm.plugins import load_general_plugins

DEMO_MODEL = Path(__file__).parents[1] / "vllm_quest" / "demo_model"

# `LLM(attention_config=...)` and backend names in tests are parsed before vLLM loads plugins.
load_general_plugins()


@pytest.fixture(scope="session")
def demo_model() -> str:
    """Path of the bundled model."""
    return str(DEMO_MODEL)
