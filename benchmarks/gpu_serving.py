"""A whole model on a GPU: QUEST beside dense backends at fixed resident contexts, in one process.

    python benchmarks/gpu_serving.py
    python benchmarks/gpu_serving.py --cases 8b:1x32768 7b:4x32768 --json result.json
    python benchmarks/gpu_serving.py --backends FLASH_ATTN FLASHINFER QUEST
    python benchmarks/gpu_serving.py --cases 8b:8x32768 --scores minmax codes --budgets 512 2048
    python benchmarks/gpu_serving.py --cases 8b:8x122880 --kv-cache-dtype fp8
    python benchmarks/gpu_serving.py --tensor-parallel 4 --random-kv --cases 70b:8x65536

Random weights in the shapes of Llama-3-8B (32 query and 8 KV heads), Llama-2-7B (32 and 32) and
Llama-3-70B (64 and 8), bf16. Every engine runs vLLM's V2 runner with full CUDA graphs for decoding.
For each case all requests are prefilled; then the median time of a decode step over all of them is
taken. A case's tokens are those that a request has at the end: 2048 fit the default budget, 2304
are beyond it.

Each score of QUEST has an engine, whose budget is the largest; requests name their own.

With `--random-kv` keys and values are random numbers, which saves the prefill of all layers but the
first. The columns attention then say which share of a step is due to the context: what it takes
longer than a step of as many requests over 256 tokens.
"""

import argparse
import gc
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from tqdm import tqdm

from report import print_machine, print_table, ratio, write_json
from vllm_quest.budgets import FIELD
from vllm_quest.config import SCORES

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "8b": LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    "7b": LLAMA | {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "70b": LLAMA
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
        "vocab_size": 128256,
    },
}
CASES = (
    "8b:1x2048",
    "8b:1x2304",
    "8b:1x32768",
    "8b:1x122880",
    "8b:8x32768",
    "8b:4x122880",
    "7b:4x32768",
)


TOKENS_PER_STEP = 8192
"""Prompts are prefilled by so many tokens at a time."""

EDGE_STEPS = 4
"""Of the steps in which all requests decode, so many at either end are not timed."""

BASE_TOKENS = 256
"""A context that attention takes next to no time for."""


def parse_case(case: str) -> tuple[str, int, int]:
    """`8b:4x122880` is the model 8b, 4 requests, 122880 tokens each, prompt and output."""
    model, _, shape = case.partition(":")
    requests, _, context = shape.partition("x")
    if model not in MODELS:
        raise argparse.ArgumentTypeError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    return model, int(requests), int(context)


def start(
    folder: str,
    backend: str,
    quest: dict[str, Any],
    cases: list[tuple[int, int]],
    *,
    num_gpus: int,
    memory: float,
    cache_dtype: str,
    random_kv: bool,
):
    """An engine of a backend; `quest` holds the settings of QUEST's."""
    from vllm import LLM

    llm = LLM(
        folder,
        attention_backend=backend,
        tensor_parallel_size=num_gpus,
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=max(context for _, context in cases),
        max_num_seqs=max(16, *(requests for requests, _ in cases)),
        max_num_batched_tokens=TOKENS_PER_STEP,
        gpu_memory_utilization=memory,
        kv_cache_dtype=cache_dtype,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        **({"additional_config": {"quest": quest}} if backend == "QUEST" else {}),
        **({"worker_extension_cls": "random_kv.Extension"} if random_kv else {}),
    )
    if random_kv:
        llm.collective_rpc("make_up_kv_cache")
        llm.collective_rpc("prefill_one_layer")
    return llm


def decode_step_ms(
    llm: Any, num_requests: int, context: int, num_tokens: int, budget: int | None
) -> float | None:
    """Median time of the steps in which every request decodes; None if there are too few.

    `budget` is that of every request in tokens; None: of the engine, if it has one.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    blocks = num_requests * -(-context // cache.block_size)
    if blocks > cache.num_gpu_blocks:
        print(f"{num_requests} x {context}: {blocks} blocks do not fit {cache.num_gpu_blocks}")
        return None
    steps = -(-num_requests * (context - num_tokens) // TOKENS_PER_STEP)
    if num_tokens <= steps + 2 * EDGE_STEPS:
        print(
            f"{num_requests} x {context}: the first request ends before the last is prefilled, in "
            f"{steps} steps; raise --tokens to {steps + 10 * EDGE_STEPS}"
        )
        return None
    own_budget = {} if budget is None else {"extra_args": {FIELD: budget}}
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **own_budget)
    for request in range(num_requests):
        prompt = [1 + (request + 7 * i) % 31000 for i in range(context - num_tokens)]
        engine.add_request(
            f"{num_requests}x{context}-{request}-{budget}", {"prompt_token_ids": prompt}, params
        )
    produced: dict[str, int] = {}
    step_ms = []
    while engine.has_unfinished_requests():
        started_s = time.perf_counter()
        outputs = engine.step()
        elapsed_ms = 1e3 * (time.perf_counter() - started_s)
        # A pure decode step: all requests had tokens before it, and all got one more.
        if len(produced) == num_requests and len(outputs) == num_requests:
            step_ms.append(elapsed_ms)
        for output in outputs:
            produced[output.request_id] = len(output.outputs[0].token_ids)
    if len(step_ms) <= 2 * EDGE_STEPS:
        print(f"{num_requests} x {context}: some waited for blocks until others had ended")
        return None
    return median(step_ms[EDGE_STEPS:-EDGE_STEPS])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", type=parse_case, default=[*map(parse_case, CASES)])
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["FLASH_ATTN", "QUEST"],
        metavar="NAME",
        help="vLLM's names; the column speed is of the last over the first (default: %(default)s)",
    )
    parser.add_argument(
        "--budgets", nargs="+", type=int, default=[2048], metavar="TOKENS", help="QUEST's (2048)"
    )
    parser.add_argument(
        "--scores", nargs="+", choices=SCORES, default=["minmax"], help="QUEST's (minmax)"
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="of all backends (auto)"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs per model (1)")
    parser.add_argument(
        "--memory", type=float, default=0.9, metavar="SHARE", help="of each GPU, for vLLM (0.9)"
    )
    parser.add_argument("--random-kv", action="store_true", help="make up keys and values")
    parser.add_argument("--tokens", type=int, default=72, help="output tokens to time (72)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if arguments.random_kv and arguments.scores != ["minmax"]:
        parser.error("--random-kv makes up the bounds of minmax alone; name no other --scores")
    for model, requests, context in arguments.cases:
        if context <= arguments.tokens:
            parser.error(
                f"{model}:{requests}x{context} has no room for a prompt before {arguments.tokens} "
                "output tokens: name more tokens, or lower --tokens"
            )

    print_machine()
    # By model, requests, context, backend, and QUEST's score and budget, which others do not have.
    step_ms: dict[tuple[Any, ...], float | None] = {}
    models = list(dict.fromkeys(model for model, *_ in arguments.cases))
    engines: list[tuple[str, str | None]] = []
    for backend in arguments.backends:
        engines += [(backend, s) for s in (arguments.scores if backend == "QUEST" else [None])]
    budgets_of = {score: arguments.budgets if score else [None] for _, score in engines}
    runs_per_case = sum(len(budgets_of[score]) for _, score in engines)
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(arguments.cases) * runs_per_case, unit="run") as progress,
    ):
        for model in models:
            (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]))
            shapes = [tuple(shape) for name, *shape in arguments.cases if name == model]
            for backend, score in engines:
                quest = {"token_budget": max(arguments.budgets), "score": score}
                llm = start(
                    folder,
                    backend,
                    quest,
                    shapes,
                    num_gpus=arguments.tensor_parallel,
                    memory=arguments.memory,
                    cache_dtype=arguments.kv_cache_dtype,
                    random_kv=arguments.random_kv,
                )
                if arguments.random_kv:
                    for requests in {requests for requests, _ in shapes}:
                        case = (model, requests, BASE_TOKENS, backend, score, None)
                        step_ms[case] = decode_step_ms(
                            llm, requests, BASE_TOKENS, arguments.tokens, None
                        )
                for (requests, context), budget in itertools.product(shapes, budgets_of[score]):
                    progress.set_description(
                        " ".join(map(str, filter(None, (backend, score, budget))))
                        + f", {model} {requests} x {context}"
                    )
                    case = (model, requests, context, backend, score, budget)
                    step_ms[case] = decode_step_ms(llm, requests, context, arguments.tokens, budget)
                    progress.update()
                llm.llm_engine.engine_core.shutdown()
                del llm
                gc.collect()
    rows = []
    for shape, score, budget in itertools.product(
        arguments.cases, arguments.scores, arguments.budgets
    ):
        model, requests, context = shape
        settings = {"QUEST": (score, budget)}
        times_ms = {
            name: step_ms[*shape, name, *settings.get(name, (None, None))]
            for name in arguments.backends
        }
        first, last = times_ms[arguments.backends[0]], times_ms[arguments.backends[-1]]
        rows.append(
            {
                "model": model,
                "gpus": arguments.tensor_parallel,
                "requests": requests,
                "context": context,
                "cache": "bfloat16" if arguments.kv_cache_dtype == "auto" else "fp8",
                "score": score,
                "budget": budget,
                **{f"{name} ms": time for name, time in times_ms.items()},
                **{f"{name} tok/s": ratio(1e3 * requests, time) for name, time in times_ms.items()},
                "speed": ratio(first, last),
            }
        )
        for name in arguments.backends if arguments.random_kv else ():
            score_of = settings.get(name, (None, None))[0]
            base = ratio(
                step_ms[model, requests, BASE_TOKENS, name, score_of, None], times_ms[name]
            )
            rows[-1][f"{name} attention"] = None if base is None else 1 - base
    print_table(rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
