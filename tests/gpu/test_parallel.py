"""Several GPUs of one host answer as one does, and their counters add up to its counters.

The bundled model, with its 2 KV heads: tensor parallelism of 2 gives each GPU one of them, of 4
each head to two GPUs.
"""

import json
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

import vllm_quest
from engines import (
    HAS_FP8,
    agree,
    answers,
    answers_of,
    engine,
    greedy,
    random_prompts,
    write_model,
    write_weights,
)
from families import FAMILIES
from servers import serve
from test_refusals import MANY_SINK_HEADS
from vllm_quest.metrics import HELP
from vllm_quest.monitor import LOOK_EVERY_S
from vllm_quest.pass_keys import make_haystack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

HAYSTACK = make_haystack(16384, 128, seed=11)
FACTS = HAYSTACK.facts[::8]
PROMPTS = [[{"role": "user", "content": HAYSTACK.prompt(fact)}] for fact in FACTS]
QUEST = {"token_budget": 2048, "dense_layers": 1}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
OPTIONS: dict[str, Any] = {
    "quest": QUEST,
    "enforce_eager": False,
    "compilation_config": GRAPHS,
    "kv_cache_memory_bytes": 2 << 30,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
}

WAYS = {
    "tensor 2": {"tensor_parallel_size": 2},
    "tensor 4, each KV head on two GPUs": {"tensor_parallel_size": 4},
    "pipeline 2": {"pipeline_parallel_size": 2},
    "tensor 2 x pipeline 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "tensor 2 by Ray": {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
}
CASES = [
    *(("V2", way) for way in WAYS),
    ("V1", "tensor 2"),
    ("V1", "pipeline 2"),
]


def need_gpus(way: dict[str, Any]) -> None:
    num_gpus = way.get("tensor_parallel_size", 1) * way.get("pipeline_parallel_size", 1)
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    if way.get("distributed_executor_backend") == "ray":
        pytest.importorskip("ray", reason="needs the package ray")


def run(llm: LLM, params: Sequence[SamplingParams]):
    """Answers, and what their decode steps counted."""
    before = vllm_quest.stats(llm).values()
    found = answers_of(llm.chat(PROMPTS, list(params), use_tqdm=False))
    after = vllm_quest.stats(llm).values()
    return found, [b - a for a, b in zip(before, after, strict=True)]


SERVERS_BUDGET = [greedy(5) for _ in FACTS]
OWN_BUDGETS = [
    greedy(5, extra_args={"quest_token_budget": (2048, -1, 4096, 1024)[i % 4]})
    for i in range(len(FACTS))
]


@pytest.fixture(scope="module")
def one_gpu(demo_model):
    with engine(demo_model, **OPTIONS) as llm:
        return run(llm, SERVERS_BUDGET), run(llm, OWN_BUDGETS)


@pytest.mark.parametrize(("runner", "way"), CASES)
def test_answers_and_counters_are_those_of_one_gpu(demo_model, one_gpu, monkeypatch, runner, way):
    need_gpus(WAYS[way])
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if runner == "V2" else "0")
    # In this process vLLM's executor of several workers would never be freed, and the refusal of
    # budgets by V2's pipelines would stay with it.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(demo_model, **OPTIONS, **WAYS[way]) as llm:
        for params, (expected, counted) in zip((SERVERS_BUDGET, OWN_BUDGETS), one_gpu, strict=True):
            in_pipeline = "pipeline_parallel_size" in WAYS[way]
            if params is OWN_BUDGETS and in_pipeline and runner == "V2":
                with pytest.raises(VLLMValidationError, match="of a pipeline but the last"):
                    run(llm, params)
                continue
            found, counts = run(llm, params)
            assert agree(expected, found)
            assert counts == counted


@pytest.mark.skipif(not HAS_FP8, reason="no GPU with FlashAttention 3")
def test_an_fp8_cache_on_two_gpus(demo_model):
    runs = []
    for way in ({}, WAYS["tensor 2"]):
        with engine(demo_model, **OPTIONS, **way, kv_cache_dtype="fp8") as llm:
            runs.append([run(llm, params) for params in (SERVERS_BUDGET, OWN_BUDGETS)])
    for (expected, counted), (found, counts) in zip(*runs, strict=True):
        assert agree(expected, found)
        assert counts == counted


def test_experts_on_several_gpus(tmp_path):
    """Qwen3-MoE's shape: experts are divided, and both GPUs hold the one KV head.

    With random weights, rounding that differs between one GPU and two may choose other pages, so
    tokens are compared where requests attend to all of them.
    """
    model = write_weights(write_model(tmp_path, **FAMILIES["Qwen3-MoE"].config))
    prompts = random_prompts([1, 17, 300, 700])
    quest = {"token_budget": 64, "dense_layers": 1}
    found, counted = [], []
    for way in ({}, {"tensor_parallel_size": 2, "enable_expert_parallel": True}):
        with engine(model, quest=quest, **way) as llm:
            found.append(answers(llm, prompts, greedy(16, extra_args={"quest_token_budget": -1})))
            before = vllm_quest.stats(llm).values()
            answers(llm, prompts, greedy(16))
            after = vllm_quest.stats(llm).values()
            counted.append([b - a for a, b in zip(before, after, strict=True)])
    assert agree(*found)
    assert counted[0] == counted[1]
    assert counted[0][0] > 0


def test_more_heads_with_sinks_than_one_gpu_takes(tmp_path):
    """The first cure that the refusal names (tests/test_refusals.py has the other)."""
    model, prompts = write_model(tmp_path, **MANY_SINK_HEADS), random_prompts([40, 300])
    quest = {"token_budget": 64, "dense_layers": 0}
    with engine(model, quest=quest, tensor_parallel_size=2) as llm:
        found = answers(llm, prompts, greedy(8))
        assert vllm_quest.stats(llm).sparse_rows > 0
    assert [len(answer.tokens) for answer in found] == [8, 8]


def served(model: str, *options: str) -> tuple[int, dict[str, dict[str, float]]]:
    """How many questions a server answers right, and its counters by engine."""
    settings = json.dumps({"quest": QUEST})
    arguments = ["--attention-backend", "QUEST", "--additional-config", settings]
    arguments += ["--compilation-config", json.dumps(GRAPHS), "--no-enable-prefix-caching"]
    arguments += ["--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(2 << 30)]
    arguments += ["--max-num-seqs", "16", *options]
    with serve(model, *arguments, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

        def ask(prompt, budget: int) -> str:
            completion = client.chat.completions.create(
                model=model,
                messages=prompt,
                temperature=0,
                max_tokens=64,
                extra_body={"ignore_eos": True, "vllm_xargs": {"quest_token_budget": budget}},
            )
            return completion.choices[0].message.content

        # Engines that take turns get both budgets each.
        budgets = [(2048, -1)[i // 2 % 2] for i in range(len(PROMPTS))]
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(ask, PROMPTS, budgets))
        time.sleep(2 * LOOK_EVERY_S)
        lines = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode().splitlines()
    counters: dict[str, dict[str, float]] = {}
    for line in lines:
        name, _, labels = line.partition("{")
        if name.removesuffix("_total") in HELP:
            engine_name = labels.partition('engine="')[2].partition('"')[0]
            of_engine = counters.setdefault(engine_name, {})
            of_engine[name] = of_engine.get(name, 0) + float(line.split()[-1])
    right = sum(text.strip().startswith(fact.code) for text, fact in zip(texts, FACTS, strict=True))
    return right, counters


@pytest.fixture(scope="module")
def alone(demo_model):
    """The counters of one engine behind a server."""
    right, counters = served(demo_model)
    assert right >= len(FACTS) - 1
    return counters["0"]


@pytest.mark.parametrize("api_servers", ["1", "2"])
def test_two_engines_behind_one_server(demo_model, alone, api_servers):
    """Data parallelism: `/metrics` has the counters of both engines, which add up to those of one.

    It may lack an engine's last two steps, of 63 that follow a prompt.
    """
    options = ["--data-parallel-size", "2", "--api-server-count", api_servers]
    right, counters = served(demo_model, *options)
    assert right >= len(FACTS) - 1
    assert counters.keys() == {"0", "1"}
    for name, value in alone.items():
        of_both = [counters[each][name] for each in ("0", "1")]
        assert min(of_both) > 0
        assert 0.9 * value <= sum(of_both) <= 1.05 * value
