"""An EAGLE head for the small random models, and a target that it often guesses right."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engines import LLAMA, write_model

TOKEN_OVER_ATTENTION = 12.0
"""How much larger a target's embeddings are made: about half of its tokens follow from them."""

CALM = 0.25
"""How much smaller its queries are made: softmax is smoother, and rounding to bf16 moves leads by
less than NEAR_TIE (without it, by more for one token in a hundred)."""


def make_next_id_likely(model: str) -> str:
    """Let a written model continue with the next token id where its attention does not object."""
    path = Path(model) / "model.safetensors"
    weights = load_file(path)
    embeddings = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embeddings.roll(1, dims=0)
    weights["model.embed_tokens.weight"] = TOKEN_OVER_ATTENTION * embeddings
    for name in weights:
        if "q_proj" in name:
            weights[name] *= CALM
    save_file(weights, path, metadata={"format": "pt"})
    return model


def write_eagle_head(folder: Path, seed: int = 1) -> str:
    """Write an EAGLE head of one layer, which guesses the next id unless its attention objects.

    It has no embeddings and no output matrix, and so takes the target's (`llama_eagle.py` in vLLM).
    """
    write_model(folder, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

    hidden, intermediate = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    queries = LLAMA["num_attention_heads"] * LLAMA["head_dim"]
    keys = LLAMA["num_key_value_heads"] * LLAMA["head_dim"]
    layer = {
        "self_attn.q_proj": random(queries, hidden, scale=4.0),
        "self_attn.k_proj": random(keys, hidden),
        "self_attn.v_proj": random(keys, hidden),
        "self_attn.o_proj": random(hidden, queries, scale=0.5),
        "mlp.gate_proj": random(intermediate, hidden),
        "mlp.up_proj": random(intermediate, hidden),
        "mlp.down_proj": random(hidden, intermediate, scale=0.5),
    }
    weights = {f"layers.0.{name}.weight": weight for name, weight in layer.items()}
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    # [token's embedding, target's hidden state] -> the embedding
    weights["fc.weight"] = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
