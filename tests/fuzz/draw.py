"""Draws engines and requests: the same of the same seed, on every machine."""

import random
from collections.abc import Sequence
from typing import Any

from engines import HAS_FP8, ON_GPU
from vllm_quest.config import GROUP_TOKENS

from . import models
from .cases import EngineCase, RequestCase, Wave
from .models import MODELS, family_options

NUM_PREFIXES = 3
V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
DTYPES = ("bfloat16", "float16") if ON_GPU else ("float32", "bfloat16", "float16")
DTYPES += ("fp8",) if HAS_FP8 else ()
"""Of the model; with fp8 the KV cache alone is."""

ANY_DTYPE = ("llama", "guessable", "demo", "Qwen2")
"""Models that run in all of them; others run in the first."""

CHOICES = ('{"type": "object", "properties": {"a": {"type": "integer"}}}',)


def draw_engine(
    seed: int, index: int, names: Sequence[str] = tuple(MODELS), dtypes: Sequence[str] = DTYPES
) -> EngineCase:
    """The engine of a seed with this number, from 0 on, of some models and dtypes."""
    rng = random.Random(f"engine {seed} {index}")
    [name] = rng.choices(names, [MODELS[name].weight for name in names])
    model = MODELS[name]
    dtype = rng.choice([dtypes[0], *dtypes]) if name in ANY_DTYPE else DTYPES[0]
    [score] = rng.choices(["minmax", "codes", "mean_std", "mid_dev"], [5, 4, 1, 1])
    if dtype == "fp8" and score == "codes":
        score = "minmax"
    page_size = rng.choice([8, 16, 16, 32, 64])
    # Hybrids' states need large blocks.
    smallest = GROUP_TOKENS if score == "codes" or model.is_hybrid else 16
    sizes = [size for size in (16, 32, 64, 96, 128) if size >= smallest and size % page_size == 0]
    block_size = rng.choice([size for size in sizes if score != "codes" or size == 128])
    max_model_len = rng.choice([384, 640, 1024])
    quest = {
        "token_budget": rng.choice([page_size, 2 * page_size, 64, 64, 100, 128, 200, -1]),
        "dense_layers": rng.choice([0, 0, 1, min(2, model.full_layers - 1)]),
        "page_size": page_size,
        "score": score,
        "keep_first_pages": rng.choice([1, 1, 2] if score == "codes" else [0, 1, 2]),
        "keep_newest_percent": rng.choice([0, 0, 25, 50, 100]),
    }
    max_num_seqs = rng.choice([8, 32, 64, 128, 128] if ON_GPU else [3, 8, 16, 32, 64])
    options: dict[str, Any] = {
        "block_size": block_size,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": rng.choice(
            [128, 200, 512, 1024] if ON_GPU else [96, 128, 200, 512]
        ),
        "enable_prefix_caching": rng.random() < 0.7,
        "scheduling_policy": rng.choice(["fcfs", "fcfs", "priority"]),
    }
    # The null block, and the states of other layers; more contexts than fit make requests wait.
    most = 64.0 if ON_GPU else 24.0
    contexts = rng.choice([1.1, 1.5, 3.0, 8.0, most, most])
    of_others = 40 if model.is_hybrid else 4 + 4 * 128 // block_size if model.has_windows else 0
    blocks = int(contexts * -(-max_model_len // block_size)) * (2 if model.has_windows else 1)
    options["num_gpu_blocks_override"] = 2 + of_others + blocks
    if model.is_hybrid:  # each row of a graph needs a block for its states
        options["max_num_seqs"] = min(max_num_seqs, 32)
    speculation = ""
    if model.can_speculate:
        # Of a checkpoint with an fp8 cache, a head's own layers would have another.
        heads = ["ngram"] if dtype == "fp8" else ["eagle", "eagle by QUEST"]
        speculation = rng.choice(["ngram", rng.choice(heads), ""])
    if model.on_disk and not speculation and not ON_GPU and rng.random() < 0.1:
        options["tensor_parallel_size"] = 2
    if name == "llama" and dtype != "fp8" and rng.random() < 0.5:
        options["enable_prompt_embeds"] = True
    options["dtype"] = "bfloat16" if dtype == "fp8" else dtype
    if dtype == "fp8":
        # The checkpoints that tests write have scales, and say that their cache is fp8.
        options["kv_cache_dtype"] = "auto" if name in models.LAYERS else "fp8"
    environment = {}
    if ON_GPU:
        is_v2 = rng.random() < 0.5 and not model.is_hybrid
        environment[V2_RUNNER] = "1" if is_v2 else "0"
        options["gpu_memory_utilization"] = 0.05  # several fuzzers may share a GPU
        # The ledger knows of drafts that were turned down only once the scheduler does.
        options["async_scheduling"] = rng.random() < 0.5 and not speculation
        if is_v2:
            options.pop("enable_prompt_embeds", None)
        # vLLM's memory that sleeps serves one engine per process: the first.
        options["enable_sleep_mode"] = index == 0
        if rng.random() < 0.6:
            tokens_per_decode = 4 if speculation else 1
            sizes = [tokens_per_decode * size for size in (1, 2, 4, 8, 16, 32, 64, 128)]
            graphs: dict[str, Any] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
            graphs["cudagraph_capture_sizes"] = sizes
            options |= {"enforce_eager": False, "compilation_config": graphs}
    return EngineCase(name, quest, options | family_options(name), speculation, environment)


def draw_wave(seed: int, index: int, wave: int, engine: EngineCase) -> Wave:
    """The wave of an engine with this number, from 0 on."""
    rng = random.Random(f"wave {seed} {index} {wave}")
    requests: list[RequestCase] = []
    count = rng.choice([12, 60, 150, 250] if ON_GPU else [4, 12, 24, 40, 64])
    for number in range(min(count, 3 * room(engine) + 12) if ON_GPU else count):
        twin = rng.choice(requests) if requests and rng.random() < 0.2 else None
        requests.append(_draw_request(rng, engine, f"w{wave}r{number}", twin))
    last = max(request.arrives for request in requests)
    resets = []
    if rng.random() < 0.3:
        resets.append((rng.randint(1, last + 40), rng.random() < 0.5))
    sleeps = 0
    if wave and engine.options.get("enable_sleep_mode"):
        # Level 2 drops the weights; vLLM reloads those of a draft head nowhere.
        has_all = MODELS[engine.model].on_disk and "eagle" not in engine.speculation
        sleeps = rng.choice([0, 1, 2] if has_all else [0, 1])
    return Wave(tuple(requests), tuple(resets), sleeps)


def room(engine: EngineCase) -> int:
    """About how many requests the engine serves at a time."""
    tokens = engine.options["num_gpu_blocks_override"] * engine.options["block_size"]
    return int(min(engine.options["max_num_seqs"], tokens // 300))


def _draw_request(
    rng: random.Random, engine: EngineCase, name: str, twin: RequestCase | None
) -> RequestCase:
    """A request, of the same prompt as its twin and at the same time if it has one."""
    options, page_size = engine.options, engine.quest["page_size"]
    model = MODELS[engine.model]
    longest = options["max_model_len"] - 2
    edges = [page_size, options["block_size"], options["max_num_batched_tokens"], GROUP_TOKENS]

    def length(limit: int) -> int:
        if rng.random() < 0.3:
            return min(limit, rng.randint(1, 300))
        near = rng.choice(edges) * rng.randint(1, 4) + rng.choice([-1, 0, 0, 1])
        return max(1, min(limit, near))

    num_shared = rng.choice([0, length(longest // 2)])
    values = {
        "arrives": rng.choice([0, 0, rng.randint(0, 60)]),
        "prefix": rng.randrange(NUM_PREFIXES),
        "num_shared": num_shared,
        "num_own": max(length(longest - num_shared - 8), 0 if num_shared else 1),
        "own": rng.randrange(1 << 30),
    }
    if twin is not None:
        values = {key: getattr(twin, key) for key in values}
    room = longest - values["num_shared"] - values["num_own"]
    num_answer = max(1, min(room, rng.choice([1, 2, page_size, 60, 120, rng.randint(1, 200)])))
    if twin is not None and rng.random() < 0.7:
        num_answer = twin.num_answer
    budget = None
    is_delivered = not engine.speculation or engine.environment.get(V2_RUNNER) == "1"
    if is_delivered and rng.random() < 0.6:
        budget = rng.choice([1, page_size, 2 * page_size, 48, 100, 200, -1, 10**6])
    more: dict[str, Any] = {}
    is_greedy = twin is not None or rng.random() < 0.75
    if not is_greedy:
        if ON_GPU:  # on CPUs vLLM 0.32 stops where the prompt of a request with a seed is cut
            more["seed"] = rng.randrange(1000)
        if rng.random() < 0.4:
            more["n"] = rng.choice([2, 3])
    if rng.random() < 0.15:
        more["logprobs"] = rng.choice([0, 3])
    if rng.random() < 0.05 and not engine.speculation:
        more["prompt_logprobs"] = 1
    if model.has_tokenizer and rng.random() < 0.2:
        more["stop"] = rng.sample(["a", "e", "the", " o"], 2)
    if model.has_tokenizer and rng.random() < 0.15:
        more["structured_outputs"] = rng.choice(
            [{"regex": "[a-z]{3,40}"}, {"choice": ["amber", "falcon"]}, {"json": CHOICES[0]}]
        )
    is_embedded = bool(options.get("enable_prompt_embeds")) and rng.random() < 0.4
    if is_embedded:
        more.pop("prompt_logprobs", None)
    return RequestCase(
        name=name,
        num_answer=num_answer,
        budget=budget,
        is_greedy=is_greedy,
        is_embedded=is_embedded,
        priority=rng.randrange(3) if options["scheduling_policy"] == "priority" else 0,
        cancelled=rng.randint(0, 60) if rng.random() < 0.1 else None,
        more=more,
        **values,
    )
