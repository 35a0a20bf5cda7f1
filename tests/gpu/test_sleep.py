"""An engine that slept answers as before: what QUEST keeps beside the KV cache survives.

vLLM keeps what an engine makes with its KV cache (the pool `runtime`: QUEST's tables of budgets and
its scratch) in host memory while it sleeps. QUEST's counters lie in no pool.
"""

import json
import urllib.request
from typing import Any

import pytest
import torch
from vllm import LLM

import vllm_quest
from engines import agree, answers, engine, greedy, random_prompts, wake, write_model, write_weights
from servers import serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

QUEST = {"token_budget": 128, "dense_layers": 1}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
LENGTHS = [1, 17, 300, 700, 1500, 33]
BUDGETS = [None, 64, None, 64, 512, -1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_weights(write_model(tmp_path_factory.mktemp("llama")))


def counts(llm: LLM) -> list[int]:
    return vllm_quest.stats(llm).values()


@pytest.mark.parametrize("runner", ["V2", "V1"])
def test_answers_and_counters_survive(model, monkeypatch, runner):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if runner == "V2" else "0")
    # vLLM's allocator of memory that can sleep serves one engine per process.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prompts = random_prompts(LENGTHS)
    params = [
        greedy(24, extra_args=None if budget is None else {"quest_token_budget": budget})
        for budget in BUDGETS
    ]
    options = {"enforce_eager": False, "compilation_config": GRAPHS, "enable_sleep_mode": True}
    with engine(model, quest=QUEST, kv_cache_memory_bytes=1 << 30, **options) as llm:
        at_start = counts(llm)
        before = answers(llm, prompts, params)
        counted = counts(llm)
        of_a_run = [b - a for a, b in zip(at_start, counted, strict=True)]
        assert all(of_a_run)
        for level in (1, 2, 1, 2):
            llm.sleep(level=level)
            assert counts(llm) == counted
            wake(llm, level)
            # Prompts arrive while the engine runs: which ones share a step, and so their rounding,
            # is not the same every time.
            assert agree(before, answers(llm, prompts, params))
            counted = [b + a for a, b in zip(of_a_run, counted, strict=True)]
            assert counts(llm) == counted


def test_a_server_sleeps_and_wakes(model):
    settings = json.dumps({"quest": QUEST})
    options = ["--attention-backend", "QUEST", "--additional-config", settings]
    options += ["--compilation-config", json.dumps(GRAPHS)]
    flags = ["--enable-sleep-mode", "--skip-tokenizer-init", "--dtype", "bfloat16"]
    memory = ["--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(1 << 30)]
    memory += ["--max-num-seqs", "8"]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    prompt = random_prompts([700])[0]["prompt_token_ids"]

    def post(url: str, **body: Any) -> bytes:
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=120).read()

    def complete(url: str) -> list[int]:
        response = json.loads(
            post(
                f"{url}/v1/completions",
                prompt=prompt,
                max_tokens=20,
                temperature=0,
                ignore_eos=True,
                return_token_ids=True,
            )
        )
        return response["choices"][0]["token_ids"]

    with serve(model, *options, *flags, *memory, env=env) as url:
        before = complete(url)
        for level in (1, 2):
            post(f"{url}/sleep?level={level}")
            post(f"{url}/wake_up?tags=weights")
            if level == 2:
                post(f"{url}/collective_rpc", method="reload_weights")
            post(f"{url}/wake_up?tags=kv_cache")
            assert complete(url) == before
