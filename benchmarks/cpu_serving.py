"""A whole model on the CPU: QUEST beside CPU_ATTN, one engine after the other in one process.

    python benchmarks/cpu_serving.py
    python benchmarks/cpu_serving.py --contexts 1024 8192 --json result.json

Llama shape, 8 layers, hidden size 1024, 8 query and 2 KV heads of 128, random weights, bf16. Prints
prefill seconds and ms per output token, and QUEST's speed as a multiple of CPU_ATTN's.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from tqdm import tqdm

from report import print_machine, print_table, write_json

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


def variants(token_budget: int, dense_layers: list[int]) -> dict[str, dict[str, Any]]:
    """The engines to compare, by name."""
    engines: dict[str, dict[str, Any]] = {"CPU_ATTN": {"attention_backend": "CPU_ATTN"}}
    for layers in dense_layers:
        settings = {"token_budget": token_budget, "dense_layers": layers}
        engines[f"QUEST, {layers} dense"] = {
            "attention_backend": "QUEST",
            "additional_config": {"quest": settings},
        }
    return engines


def measure(
    model: str, options: dict[str, Any], contexts: list[int], num_tokens: int, progress: tqdm
) -> dict[int, tuple[float, float]]:
    """Prefill seconds and median ms per output token, by context length in tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(contexts) + num_tokens,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=int(1.15 * (max(contexts) + num_tokens + 1024) * 8 * 2 * 512),
        disable_log_stats=False,
        **options,
    )
    results = {}
    for context in contexts:
        progress.set_description(f"{options['attention_backend']}, {context} tokens")
        prompt = {"prompt_token_ids": [1 + (7 * i) % 31000 for i in range(context)]}
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        prefill_s, step_ms = [], []
        for _ in range(3 if context <= 4096 else 1):
            [output] = llm.generate([prompt], params, use_tqdm=False)
            times = output.metrics
            prefill_s.append(times.first_token_ts - times.scheduled_ts)
            step_ms.append(1e3 * (times.last_token_ts - times.first_token_ts) / (num_tokens - 1))
        results[context] = median(prefill_s), median(step_ms)
        progress.update()
    llm.llm_engine.engine_core.shutdown()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768, 61440])
    parser.add_argument(
        "--quest-dense-layers",
        type=int,
        nargs="*",
        default=[0, 2],
        metavar="LAYERS",
        help="engines of QUEST to run, by their dense layers (0 2)",
    )
    parser.add_argument("--budget", type=int, default=2048, help="token budget (2048)")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens to time (64)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()

    print_machine()
    engines = variants(arguments.budget, arguments.quest_dense_layers)
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(engines) * len(arguments.contexts), unit="run") as progress,
    ):
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        measured = {
            name: measure(folder, options, arguments.contexts, arguments.tokens, progress)
            for name, options in engines.items()
        }
    rows = []
    for context in arguments.contexts:
        dense_prefill_s, dense_step_ms = measured["CPU_ATTN"][context]
        for name in engines:
            prefill_s, step_ms = measured[name][context]
            rows.append(
                {
                    "context": context,
                    "backend": name,
                    "prefill s": prefill_s,
                    "prefill speed": dense_prefill_s / prefill_s,
                    "ms per token": step_ms,
                    "decode speed": dense_step_ms / step_ms,
                }
            )
    print_table(rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
