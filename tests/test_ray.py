"""Ray's workers know QUEST without a flag of their own.

vLLM 0.32 has no Ray for CPUs, so that here only what it would hand to a worker is tried;
tests/gpu/test_parallel.py runs engines. Ray is not among the packages that tests install.
"""

import os

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.ray.ray_env import get_env_vars_to_copy

from engines import write_model
from vllm_quest import metrics, plugin


def test_ray_copies_where_counters_go(monkeypatch):
    """Beside what the user has copied; twice is as once."""
    monkeypatch.setenv(metrics.RAY_COPIES, "MINE")
    metrics.expose()
    metrics.expose()
    assert os.environ[metrics.RAY_COPIES].count(metrics.OUR_DIRECTORY) == 1
    assert {"MINE", metrics.VLLM_DIRECTORY, metrics.OUR_DIRECTORY} <= get_env_vars_to_copy()


def test_a_ray_worker_reads_a_configuration_that_selects_quest(tmp_path, monkeypatch):
    """It is unpickled before any plugin was loaded there."""
    ray = pytest.importorskip("ray", reason="needs the package ray")
    arguments = EngineArgs(
        write_model(tmp_path), attention_backend="QUEST", skip_tokenizer_init=True
    )
    vllm_config = arguments.create_engine_config()

    def selected(vllm_config):
        return os.getpid(), plugin.is_selected(vllm_config)

    ray.init(num_cpus=2, include_dashboard=False)
    try:
        pid, is_selected = ray.get(ray.remote(selected).remote(vllm_config))
    finally:
        ray.shutdown()
    assert is_selected and pid != os.getpid()
