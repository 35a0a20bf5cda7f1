"""vLLM's own programs with QUEST: its benchmarks and its batches of requests from a file.

Each starts engines of its own, which takes a minute on CPUs; they ran there too.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from engines import ON_GPU, write_model
from servers import serve
from vllm_quest.pass_keys import make_haystack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU, reason="each engine takes a minute on CPUs"),
]

QUEST = ["--attention-backend", "QUEST", "--additional-config"]
QUEST += [json.dumps({"quest": {"token_budget": 256, "dense_layers": 0}})]
EAGER = ["--enforce-eager", "--gpu-memory-utilization", "0.15"]
EAGER += ["--kv-cache-memory-bytes", str(1 << 30)]  # other tests may start and stop on this GPU
RANDOM = ["--dataset-name", "random", "--random-input-len", "1024", "--random-output-len", "16"]


def run_vllm(*arguments: str) -> str:
    """What `vllm` prints."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    output = process.stdout + process.stderr
    assert process.returncode == 0, output[-4000:]
    return output


def test_bench_latency(tmp_path):
    # Its prompts have token ids up to 10,000.
    model = write_model(tmp_path, vocab_size=16384)
    sizes = ["--input-len", "1024", "--output-len", "16", "--batch-size", "4", "--num-iters", "3"]
    dummy = ["--load-format", "dummy", "--skip-tokenizer-init", "--disable-detokenize"]
    dummy += ["--dtype", "bfloat16", "--num-iters-warmup", "1"]
    output = run_vllm("bench", "latency", "--model", model, *QUEST, *EAGER, *sizes, *dummy)
    assert "QUEST attends to 256 tokens" in output
    assert re.search(r"Avg latency: [\d.]+ seconds", output)


def test_bench_throughput(demo_model):
    more = ["--num-prompts", "16", *RANDOM]
    output = run_vllm("bench", "throughput", "--model", demo_model, *QUEST, *EAGER, *more)
    assert "QUEST attends to 256 tokens" in output
    assert re.search(r"Throughput: [\d.]+ requests/s", output)


def test_bench_serve(demo_model, monkeypatch):
    """With a budget in every request."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    body = json.dumps({"vllm_xargs": {"quest_token_budget": 128}})
    with serve(demo_model, *QUEST, *EAGER) as url:
        more = ["--num-prompts", "16", *RANDOM, "--base-url", url, "--extra-body", body]
        output = run_vllm("bench", "serve", "--model", demo_model, *more)
    assert re.search(r"Successful requests: +16\b", output)


def test_run_batch(demo_model, tmp_path):
    """Requests with different budgets, one of them bad: it alone fails."""
    haystack = make_haystack(8000, 64, seed=3)
    fact = haystack.facts[0]
    bodies = [
        {
            "model": demo_model,
            "messages": [{"role": "user", "content": haystack.prompt(fact)}],
            "max_tokens": 5,
            "temperature": 0,
            "vllm_xargs": {"quest_token_budget": budget},
        }
        for budget in (-1, 4096, 0)
    ]
    requests = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("".join(f"{json.dumps(request)}\n" for request in requests))
    files = ["-i", str(questions), "-o", str(answers)]
    run_vllm("run-batch", *files, "--model", demo_model, *QUEST, *EAGER)
    lines = map(json.loads, answers.read_text().splitlines())
    of_request = {line["custom_id"]: line for line in lines}
    for name in ("0", "1"):
        (choice,) = of_request[name]["response"]["body"]["choices"]
        assert choice["message"]["content"].strip() == fact.code
    assert "quest_token_budget is 0" in json.dumps(of_request["2"])
