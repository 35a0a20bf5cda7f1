"""The shapes of decoder families: what people serve, with few layers and small matrices."""

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from engines import ON_GPU, VOCABULARY

WINDOW = 64
"""Tokens, in place of the 512 to 4096 of real checkpoints, so that short prompts exceed it."""

SINK = 6.0
"""Mean of the sinks, so that they take much of the attention."""

SHARPNESS = 2.0
"""Standard deviation of queries' and keys' elements, so that attention decides the next token."""


@dataclass(frozen=True)
class Family:
    """A configuration in a family's shape, and what the test expects of it."""

    architecture: str
    model_type: str
    values: dict[str, Any]
    """What `config.json` says beyond `COMMON`."""

    sparse_layers: int
    """Full-attention layers behind the first, which is left dense."""

    options: dict[str, Any] = field(default_factory=dict)
    """Engine options."""

    is_hybrid: bool = False
    """Whether layers of other kinds keep states beside the attention layers' keys and values."""

    needs_gpu: str = ""
    """Why vLLM 0.32 does not run it on CPUs, with any backend; empty where it does."""

    in_ci: bool = False
    """Whether it stands for a shape that no other family of the default run has."""

    @property
    def config(self) -> dict[str, Any]:
        names = {"architectures": [self.architecture], "model_type": self.model_type}
        return COMMON | names | self.values

    def extended(self, **values: Any) -> "Family":
        """The family with more in its `config.json`."""
        return replace(self, values=self.values | values)


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def heads(num_heads: int, num_kv_heads: int, head_size: int) -> dict[str, int]:
    """As most configurations spell them."""
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_size,
    }


def experts(count: str = "num_experts", **more: Any) -> dict[str, Any]:
    """Four experts, of which two answer."""
    return {count: 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64} | more


def windows(*kinds: str) -> dict[str, Any]:
    """Layer kinds in order: `w` attends in a window, `f` in full."""
    names = {"w": "sliding_attention", "f": "full_attention"}
    return {
        "layer_types": [names[kind] for kind in kinds],
        "num_hidden_layers": len(kinds),
        "sliding_window": WINDOW,
    }


GDN = {
    "linear_key_head_dim": 128,  # as checkpoints have it; FlashInfer's kernel takes no other
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
}
"""Gated delta net between full-attention layers."""

MAMBA_2 = {} if ON_GPU else {"enable_prefix_caching": False}
"""vLLM 0.32 fails on CPUs when it caches prefixes of these models, with any attention backend."""

BF16 = {"dtype": "bfloat16"}
"""The dtype of vLLM's gated delta net on CPUs."""

FAMILIES = {
    "Llama 3": Family(
        "LlamaForCausalLM",
        "llama",
        heads(4, 1, 128)
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
        sparse_layers=2,
        in_ci=True,
    ),
    "SmolLM": Family("LlamaForCausalLM", "llama", heads(9, 3, 64) | {"hidden_size": 576}, 2),
    "Mistral": Family(
        "MistralForCausalLM", "mistral", heads(4, 1, 128) | {"sliding_window": None}, 2
    ),
    "Mistral 7B v0.1": Family(
        "MistralForCausalLM", "mistral", heads(4, 1, 128) | {"sliding_window": WINDOW}, 0
    ),
    "Ministral": Family(
        "MistralForCausalLM", "ministral", heads(4, 1, 128) | windows("f", "w", "w", "f"), 1
    ),
    "Ministral 3": Family(
        "Ministral3ForCausalLM",
        "ministral3",
        heads(4, 1, 128)
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 128,
                "llama_4_scaling_beta": 0.1,
            }
        },
        2,
    ),
    "Qwen2": Family(
        "Qwen2ForCausalLM", "qwen2", heads(14, 2, 64) | {"hidden_size": 896}, 2, in_ci=True
    ),
    "Qwen3": Family("Qwen3ForCausalLM", "qwen3", heads(4, 2, 128), 2, in_ci=True),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", "qwen3_moe", heads(8, 1, 128) | experts(), 2),
    "Mixtral": Family(
        "MixtralForCausalLM", "mixtral", heads(4, 1, 128) | experts("num_local_experts"), 2
    ),
    "GLM-4": Family(
        "Glm4ForCausalLM",
        "glm4",
        heads(16, 1, 128) | {"partial_rotary_factor": 0.5, "attention_bias": True},
        2,
    ),
    "GLM-4.5": Family(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        heads(12, 1, 128)
        | experts("n_routed_experts", first_k_dense_replace=1)
        | {"partial_rotary_factor": 0.5, "use_qk_norm": True, "attention_bias": True},
        2,
        in_ci=True,
    ),
    "MiniMax-M2": Family(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        heads(6, 1, 128)
        | experts("num_local_experts", rotary_dim=64, use_qk_norm=True)
        | {"scoring_func": "sigmoid", "use_routing_bias": True},
        2,
        needs_gpu="vLLM routes to experts by softmax alone on CPUs",
    ),
    "Phi-3": Family(
        "Phi3ForCausalLM", "phi3", heads(4, 4, 96) | {"hidden_size": 384}, 2, in_ci=True
    ),
    "OLMo": Family("OlmoForCausalLM", "olmo", heads(2, 2, 64), 2),
    "OLMo 2": Family("Olmo2ForCausalLM", "olmo2", heads(2, 2, 64), 2),
    "OLMo 3": Family("Olmo3ForCausalLM", "olmo3", heads(2, 2, 64) | windows("f", "w", "f"), 1),
    "Granite": Family(
        "GraniteForCausalLM",
        "granite",
        heads(4, 1, 64) | {"attention_multiplier": 0.1, "residual_multiplier": 0.5},
        2,
        in_ci=True,
    ),
    "Cohere": Family(
        "CohereForCausalLM",
        "cohere",
        heads(4, 1, 128) | {"hidden_size": 512, "use_qk_norm": True},
        2,
    ),
    "Cohere 2": Family(
        "Cohere2ForCausalLM",
        "cohere2",
        heads(4, 1, 128) | windows("f", "w", "w", "f") | {"hidden_size": 512},
        1,
    ),
    "Gemma": Family("GemmaForCausalLM", "gemma", heads(8, 1, 256), 2),
    "Gemma 2": Family(
        "Gemma2ForCausalLM",
        "gemma2",
        heads(4, 2, 256)
        | windows("f", "w", "f", "w")
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        1,
        in_ci=True,
    ),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        heads(4, 1, 256)
        | windows("f", "w", "w", "f")
        | {"query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh"},
        1,
    ),
    "Gemma 3n": Family(
        "Gemma3nForCausalLM",
        "gemma3n_text",
        heads(4, 1, 256)
        | windows("w", "f", "w", "f", "w", "f")
        | {
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.0] * 6,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        2,
    ),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        "gpt2",
        {"num_attention_heads": 2, "n_inner": 128},
        2,
    ),
    "GPT-BigCode": Family(
        "GPTBigCodeForCausalLM",
        "gpt_bigcode",
        {"hidden_size": 512, "num_attention_heads": 4, "n_inner": 128, "multi_query": True},
        2,
        in_ci=True,
    ),
    "GPT-J": Family(
        "GPTJForCausalLM",
        "gptj",
        {"hidden_size": 512, "num_attention_heads": 2, "n_inner": 128, "rotary_dim": 64},
        2,
    ),
    "GPT-NeoX": Family(
        "GPTNeoXForCausalLM", "gpt_neox", {"num_attention_heads": 2, "rotary_pct": 0.25}, 2
    ),
    "Falcon": Family(
        "FalconForCausalLM",
        "falcon",
        {"num_attention_heads": 2, "multi_query": True, "parallel_attn": True, "bias": False},
        2,
    ),
    "Falcon 40B": Family(
        "FalconForCausalLM",
        "falcon",
        {
            "num_attention_heads": 8,
            "num_kv_heads": 2,
            "hidden_size": 512,
            "new_decoder_architecture": True,
            "bias": False,
        },
        2,
    ),
    "EXAONE 4": Family(
        "Exaone4ForCausalLM",
        "exaone4",
        heads(5, 1, 128) | windows("f", "w", "f") | {"sliding_window_pattern": "LLLG"},
        1,
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "gpt_oss",
        heads(16, 2, 64)
        | windows("w", "f", "w", "f")
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 512,
            },
        },
        1,
        in_ci=True,
    ),
    "DBRX": Family(
        "DbrxForCausalLM",
        "dbrx",
        {
            "hidden_size": 768,
            "num_attention_heads": 6,
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 500000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
        2,
    ),
    "Qwen3-Next": Family(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        heads(8, 1, 256) | GDN | experts(shared_expert_intermediate_size=64),
        1,
        options=BF16,
        is_hybrid=True,
    ),
    "Qwen3.5": Family(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        heads(4, 1, 256) | GDN,
        1,
        needs_gpu="its module imports torchvision, which vLLM for CPUs goes without",
        is_hybrid=True,
    ),
    "Nemotron-H": Family(
        "NemotronHForCausalLM",
        "nemotron_h",
        heads(5, 1, 128)
        | {
            "layers_block_type": ["mamba", "attention", "mlp", "mamba", "attention"],
            "num_hidden_layers": 5,
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 64,
            "n_groups": 1,
        },
        1,
        options=MAMBA_2,
        is_hybrid=True,
    ),
    "Granite 4": Family(
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        heads(4, 1, 128)
        | {
            "hidden_size": 512,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 16,
            "mamba_d_head": 64,
            "mamba_d_state": 16,
            "attention_multiplier": 0.1,
        },
        1,
        options=MAMBA_2,
        is_hybrid=True,
    ),
    "Falcon-H1": Family(
        "FalconH1ForCausalLM",
        "falcon_h1",
        heads(4, 2, 64)
        | {"mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16},
        2,
        options=MAMBA_2,
        is_hybrid=True,
    ),
    "LFM2": Family(
        "Lfm2ForCausalLM",
        "lfm2",
        {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "num_hidden_layers": 4,
            "block_multiple_of": 64,
            "conv_dim": 256,
            "block_dim": 256,
            "block_ff_dim": 128,
        },
        1,
        in_ci=True,
        is_hybrid=True,
    ),
    "Llama 4": Family(
        "Llama4ForCausalLM",
        "llama4_text",
        heads(5, 1, 128)
        | {
            "num_hidden_layers": 4,
            "no_rope_layers": [0, 1, 1, 0],
            "attention_chunk_size": 128,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "floor_scale": 128,
        },
        1,
        in_ci=True,
    ),
}


def random_weights(loader: Any, model: torch.nn.Module, model_config: Any) -> None:
    """In place of `DummyModelLoader.load_weights`, whose weights are too small for attention.

    The weights depend on their names, not on the attention backend.
    """
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(weight.shape, generator=generator)
        attends = any(part in name for part in ("attn", "attention", "Wqkv", "qkv", "mixer"))
        if weight.dim() > 1:
            values *= (SHARPNESS if attends else 1.0) / weight.shape[-1] ** 0.5
        elif name.endswith("sinks"):
            values = SINK + values
        elif "norm" in name or "ln_" in name:
            values = 0.1 * values + (SHARPNESS if attends else 1.0)
        elif name.endswith(".A"):
            values = -1.0 - values.abs()  # Mamba's states must decay
        else:
            values *= 0.1
        weight.data.copy_(values)
