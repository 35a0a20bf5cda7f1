"""The demo model: Llama in plain PyTorch, with parameters named as in transformers' checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query, key, value) -> output, all `[rows, heads, tokens, head_size]`."""


@dataclass(frozen=True)
class Shape:
    """The model's dimensions."""

    vocabulary: int
    hidden: int = 256
    feed_forward: int = 704
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    rope_base: float = 1e6
    max_positions: int = 40_960
    norm_eps: float = 1e-5


def causal_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention of every token to those before it."""
    group_size = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group_size, dim=1)
    value = value.repeat_interleave(group_size, dim=1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = shape.head_size
        query_size = shape.heads * shape.head_size
        kv_size = shape.kv_heads * shape.head_size
        self.q_proj = nn.Linear(shape.hidden, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        out = attend(self.layer, *self.project(x, cos, sin))
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, `[rows, heads, tokens, head_size]`."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, cos, sin), rotate(key, cos, sin), value


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.down_proj = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, layer) for layer in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Llama(nn.Module):
    """A causal language model whose attention is handed in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw new weights: a stream of unit size, to which all layers together add as much."""
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                nn.init.ones_(weight)
                continue
            std = 1.0 if name == "model.embed_tokens.weight" else self.shape.hidden**-0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std = (2 * self.shape.layers * weight.shape[1]) ** -0.5
            nn.init.normal_(weight, std=std, generator=generator)

    def forward(
        self,
        tokens: Tensor,
        attend: Attend = causal_attention,
        first_position: int = 0,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next tokens.

        Args:
            tokens: `[rows, tokens]` int64.
            attend: attention of every layer.
            first_position: position of the first token.
            wanted: `[rows, n]` int64, indices of the tokens whose logits are wanted; all if None.

        Returns:
            `[rows, tokens or n, vocabulary]`.
        """
        cos, sin = self._rotation(first_position, tokens.shape[1], tokens.device)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin, attend)
        if wanted is not None:
            x = x.gather(1, wanted[..., None].expand(-1, -1, x.shape[-1]))
        return self.lm_head(self.model.norm(x))

    def _rotation(
        self, first_position: int, num_tokens: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.shape.head_size, 2, device=device) / self.shape.head_size
        positions = torch.arange(first_position, first_position + num_tokens, device=device)
        angles = torch.outer(positions.float(), self.shape.rope_base**-exponents)
        angles = torch.cat((angles, angles), dim=-1)  # [tokens, head_size]
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `[rows, heads, tokens, head_size]`, halves paired."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
