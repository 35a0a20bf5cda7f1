"""Prefill in one engine and decoding in another: blocks and bounds move by NIXL.

Two servers, on CPUs with their KV caches in host memory, on GPUs with one GPU each. NIXL is not
among the packages that tests install: `pip install nixl`.
"""

import contextlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import (
    DENSE,
    ON_GPU,
    VOCABULARY,
    Answer,
    agree,
    random_prompts,
    write_model,
    write_weights,
)
from servers import free_port, serve

pytest.importorskip("nixl", reason="needs the package nixl")
if ON_GPU and torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

LENGTHS = [1, 17, 300, 640, 641, 1001]
"""Prompts that end within a page, behind one, in a full block of 128, and one token behind it."""

QUEST = {"token_budget": 128, "dense_layers": 0}
CHUNK_TOKENS = "256"


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=120))

    def complete(self, prompt: list[int], num_tokens: int, **more: Any) -> dict[str, Any]:
        return self.post(
            "/v1/completions",
            prompt=prompt,
            max_tokens=num_tokens,
            temperature=0,
            ignore_eos=True,
            logprobs=2,
            return_token_ids=True,
            return_tokens_as_token_ids=True,
            **more,
        )

    def checked_pages(self) -> int:
        """See `checked_bounds.Extension`."""
        return int(self.post("/collective_rpc", method="checked_pages")["results"][0])

    def tokens_received(self) -> int:
        """By vLLM's own counter, of prompts whose blocks came from another engine."""
        metrics = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        name = "vllm:external_prefix_cache_hits_total"
        lines = [line for line in metrics.splitlines() if line.startswith(name)]
        return int(sum(float(line.split()[-1]) for line in lines))


@contextlib.contextmanager
def start(
    model: str, folder: Path, gpu: int, role: str, quest: dict[str, Any] | None
) -> Iterator[Server]:
    """One engine of a pair; `quest` is None for the dense backend."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": role}
    options = {
        "--attention-backend": DENSE if quest is None else "QUEST",
        "--kv-transfer-config": json.dumps(transfer),
        "--max-num-batched-tokens": CHUNK_TOKENS,
        "--max-model-len": "2048",
        "--block-size": "128",
        "--gpu-memory-utilization": "0.15" if ON_GPU else "0.9",
        "--kv-cache-memory-bytes": str(1 << 28),
        "--dtype": "bfloat16" if ON_GPU else "float32",
    }
    flags = ["--skip-tokenizer-init", "--enforce-eager", "--no-enable-prefix-caching"]
    if quest is not None:
        options["--additional-config"] = json.dumps({"quest": quest})
        options["--worker-extension-cls"] = "checked_bounds.Extension"
    env = {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[gpu],
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        "VLLM_SERVER_DEV_MODE": "1",
    }
    log = folder / f"{role}-{gpu}.log"
    arguments = [word for option in options.items() for word in option]
    with log.open("wb") as file, serve(model, *arguments, *flags, env=env, log=file) as url:
        yield Server(url, log)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_weights(write_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def decoder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    with start(model, folder, 1, "kv_consumer", QUEST) as server:
        server.post("/collective_rpc", method="check_bounds")
        yield server


def prefilled(prefiller: Server, prompt: list[int]) -> dict[str, Any]:
    """Where the prompt's blocks wait, as the engine that prefilled it says."""
    wanted = {"do_remote_decode": True, "do_remote_prefill": False}
    return prefiller.complete(prompt, 1, kv_transfer_params=wanted)["kv_transfer_params"]


def answer(response: dict[str, Any]) -> Answer:
    choice = response["choices"][0]
    best = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
    leads = (first - second for first, second, *_ in best)
    return Answer(tuple(choice["token_ids"]), tuple(leads))


def test_bounds_arrive_with_their_keys(model, decoder, tmp_path):
    """And the answers are those of an engine that prefilled by itself."""
    prompts = [prompt["prompt_token_ids"] for prompt in random_prompts(LENGTHS)]
    alone = [answer(decoder.complete(prompt, 20)) for prompt in prompts]
    before = decoder.checked_pages()
    assert decoder.tokens_received() == 0
    with start(model, tmp_path, 0, "kv_producer", QUEST) as prefiller:
        places = [prefilled(prefiller, prompt) for prompt in prompts]
        moved = [
            answer(decoder.complete(prompt, 20, kv_transfer_params=place))
            for prompt, place in zip(prompts, places, strict=True)
        ]
    assert agree(alone, moved)
    assert decoder.tokens_received() >= sum(LENGTHS) - len(LENGTHS)
    assert decoder.checked_pages() > before + sum(LENGTHS) / 16


OTHERS = {
    "a dense backend": None,
    "another score": QUEST | {"score": "mean_std"},
    "another page size": QUEST | {"page_size": 32},
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_engine_with_other_blocks_is_refused_at_the_handshake(model, decoder, tmp_path, other):
    prompt = [3 + i % (VOCABULARY - 3) for i in range(300)]
    with start(model, tmp_path, 0, "kv_producer", OTHERS[other]) as prefiller:
        place = prefilled(prefiller, prompt)
        with pytest.raises(urllib.error.HTTPError):
            decoder.complete(prompt, 4, kv_transfer_params=place)
    lines = [line for line in decoder.log.read_text().splitlines() if "hash mismatch" in line]
    assert "(QUEST with blocks of 128 tokens, pages of 16, score minmax), Remote:" in lines[-1]
    assert len(decoder.complete(prompt, 4)["choices"]) == 1  # the engine goes on
