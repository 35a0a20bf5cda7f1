"""Time to the first token of a long prompt whose KV blocks come back from host memory, on a GPU.

    python benchmarks/offload.py --json result.json
    python benchmarks/offload.py --context 131072 --connector SimpleCPUOffloadConnector

Random weights in the shape of Llama-3-8B, bf16. A prompt is prefilled; asked again while its blocks
are in the GPU's cache; and asked again when they are in host memory alone. QUEST's blocks have 17
rows where FLASH_ATTN's have 16.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from gpu_serving import MODELS
from report import print_machine, print_table, write_json

HITS = "vllm:external_prefix_cache_hits"


def start(folder: str, backend: str, context: int, connector: str, host_gib: int) -> Any:
    from vllm import LLM

    transfer = {
        "kv_connector": connector,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": host_gib << 30},
    }
    return LLM(
        folder,
        attention_backend=backend,
        kv_transfer_config=transfer,
        load_format="dummy",
        skip_tokenizer_init=True,
        disable_log_stats=False,
        max_model_len=context + 128,
        max_num_batched_tokens=8192,
        block_size=128,
        gpu_memory_utilization=0.9,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )


def first_token_ms(llm: Any, prompt: list[int]) -> float:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    started_s = time.perf_counter()
    llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    return 1e3 * (time.perf_counter() - started_s)


def let_stores_end(llm: Any) -> None:
    """Stores are begun by the step after the one that computed the blocks, and seen by another."""
    for _ in range(3):
        first_token_ms(llm, [5])
        time.sleep(1)


def hits(llm: Any) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == HITS)


def measure(llm: Any, context: int, repeats: int) -> dict[str, float]:
    first_token_ms(llm, [7] * 8192)  # warm up
    times: dict[str, list[float]] = {"prefilled": [], "on the GPU": [], "on the host": []}
    for repeat in range(repeats):
        prompt = [1 + (repeat + 7 * i) % 31000 for i in range(context)]
        times["prefilled"].append(first_token_ms(llm, prompt))
        let_stores_end(llm)
        times["on the GPU"].append(first_token_ms(llm, prompt))
        assert llm.reset_prefix_cache()
        before = hits(llm)
        times["on the host"].append(first_token_ms(llm, prompt))
        if hits(llm) - before < context - 2 * 128:
            raise RuntimeError(
                f"{hits(llm) - before} of {context} tokens came from host memory; raise --host-gib"
            )
    return {f"{name} ms": median(of_name) for name, of_name in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=65536, help="tokens of the prompt (65536)")
    parser.add_argument("--connector", default="OffloadingConnector", metavar="NAME")
    parser.add_argument("--host-gib", type=int, default=40, help="host memory for blocks (40)")
    parser.add_argument("--repeats", type=int, default=3, help="prompts to time (3)")
    parser.add_argument("--backends", nargs="+", default=["FLASH_ATTN", "QUEST"], metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()

    print_machine()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS["8b"]))
        for backend in arguments.backends:
            llm = start(folder, backend, arguments.context, arguments.connector, arguments.host_gib)
            times_ms = measure(llm, arguments.context, arguments.repeats)
            rows.append({"backend": backend, "context": arguments.context, **times_ms})
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
    print_table(rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
