"""Small models with random weights, and engines that run them to the end."""

import contextlib
import gc
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt

VOCABULARY = 512
ON_GPU = torch.cuda.is_available()
HAS_FP8 = ON_GPU and torch.cuda.get_device_capability() == (9, 0)
"""Whether prefill takes fp8 caches, as FlashAttention 3 does."""

DENSE = "FLASH_ATTN" if ON_GPU else "CPU_ATTN"
"""The backend that QUEST is compared with."""

NEAR_TIE = 0.25 if ON_GPU else 4e-6
"""A lead in log probability that rounding may undo in few layers: some 8 roundings of logits about
8, to bf16 on GPUs and to fp32 on CPUs."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, with the lead in log probability that each had over the next."""

    tokens: tuple[int, ...]
    leads: tuple[float, ...] = field(compare=False)


def write_model(folder: Path, *, without: Sequence[str] = (), **changes: Any) -> str:
    """Write a Llama configuration with some values changed or left out.

    vLLM makes up weights for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (LLAMA | changes).items() if key not in without}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_weights(folder: str, seed: int = 0) -> str:
    """Give a written model random weights, large enough for attention to decide the next token."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                scale = 4.0 if "q_proj" in name or "v_proj" in name else 1.0
                weight.normal_(std=scale / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


ATTENTION_SHAPES = {
    "8B, grouped": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "head size 64": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
}
"""Attention of models in whose shape GPU tests write theirs."""

KV_SCALES = {"q_scale": 0.07, "k_scale": 0.013, "v_scale": 0.041}
"""Of `write_fp8_scales`: with them the numbers of `write_weights` come to less than fp8's largest,
448, and lie far from where scales of 1 would put them."""

KV_SCHEME = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}
"""How a checkpoint of compressed-tensors says that its KV cache is fp8, with a scale per layer."""


def kv_quantised(**scheme: Any) -> dict[str, Any]:
    """What makes `auto` an fp8 cache, in a model's configuration; `scheme` changes KV_SCHEME."""
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": [],
            "kv_cache_scheme": KV_SCHEME | scheme,
        }
    }


def write_fp8_scales(folder: str) -> str:
    """Give a model with weights the scales of an fp8 KV cache, as checkpoints have them."""
    weights = Path(folder) / "model.safetensors"
    tensors = load_file(weights)
    layers = {name.split(".self_attn.")[0] for name in tensors if ".self_attn." in name}
    for layer in layers:
        for name, scale in KV_SCALES.items():
            tensors[f"{layer}.self_attn.{name}"] = torch.tensor([scale])
    save_file(tensors, weights, metadata={"format": "pt"})
    config = Path(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | kv_quantised()))
    return folder


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[TokensPrompt]:
    rng = random.Random(seed)
    return [
        TokensPrompt(prompt_token_ids=[rng.randrange(3, VOCABULARY) for _ in range(length)])
        for length in lengths
    ]


@contextlib.contextmanager
def engine(
    model: str, backend: str = "QUEST", quest: dict[str, Any] | None = None, **options: Any
) -> Iterator[LLM]:
    """Run an engine in this process; random weights in fp32 where it may be, against near-ties."""
    has_tokenizer = (Path(model) / "tokenizer.json").exists()
    defaults: dict[str, Any] = {
        "attention_backend": backend,
        "additional_config": {"quest": quest or {}} if backend == "QUEST" else {},
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 28,
        "gpu_memory_utilization": 0.15 if ON_GPU else 0.9,  # several tests may share a GPU
        "disable_log_stats": False,
        "skip_tokenizer_init": not has_tokenizer,
        "dtype": "auto" if has_tokenizer else "bfloat16" if ON_GPU else "float32",
        "load_format": "auto" if (Path(model) / "model.safetensors").exists() else "dummy",
    }
    llm = LLM(model, **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def wake(llm: LLM, level: int) -> None:
    """Wake an engine that slept at a level, as reinforcement learning does: weights come first."""
    llm.wake_up(tags=["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def greedy(num_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=2, **options
    )


def generate(
    model: str,
    prompts: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams],
    **options: Any,
) -> list[Answer]:
    """What a fresh engine answers each prompt with."""
    with engine(model, **options) as llm:
        return answers(llm, prompts, params)


def agree(left: Sequence[Answer], right: Sequence[Answer]) -> bool:
    """Whether two runs answer alike: up to the first token that rounding may have decided."""
    return all(_agree(a, b) for a, b in zip(left, right, strict=True))


def _agree(left: Answer, right: Answer) -> bool:
    for ours, theirs, lead in zip(left.tokens, right.tokens, left.leads, strict=True):
        if ours != theirs:
            return lead < NEAR_TIE
    return True


def answers(
    llm: LLM,
    prompts: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams],
    **options: Any,
) -> list[Answer]:
    """What `agree` compares; the sampling parameters must ask for two log probabilities."""
    return answers_of(llm.generate(prompts, params, use_tqdm=False, **options))


def answers_of(results: Sequence[RequestOutput]) -> list[Answer]:
    """The same, of requests that were run."""
    outputs = [result.outputs[0] for result in results]
    return [
        Answer(tuple(output.token_ids), tuple(map(_lead, output.logprobs or ())))
        for output in outputs
    ]


def _lead(logprobs: dict[int, Any]) -> float:
    first, second = sorted((entry.logprob for entry in logprobs.values()), reverse=True)[:2]
    return first - second


def token_ids(
    llm: LLM, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams]
) -> list[list[int]]:
    results = llm.generate(prompts, params, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def counter(llm: LLM, name: str) -> int:
    """Value of one of vLLM's own counters."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)
