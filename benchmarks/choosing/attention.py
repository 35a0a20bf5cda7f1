"""A model of transformers whose attention is dense while it reads and sparse while it decodes.

All decode steps of a stream run in one forward pass under teacher forcing. A step's keys and values
depend on what the step attended to in the layers before, as they do when tokens come one by one:
the pass computes the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from benchmarks.choosing.methods import Method
from benchmarks.choosing.rows import Rows, make_rows
from benchmarks.choosing.selection import chosen_pages

ATTENTION = "vllm_quest_choosing"
"""The name of this module's attention in transformers."""

WINDOW_CHUNK = 1024
"""Queries of a sliding layer that are read at once."""

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of a layer, `[kv_heads, tokens, head_size]`; keys after the rotary embedding."""


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layer_attention: "Reading | Decoding",
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Hand a layer's attention on; as transformers calls it."""
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("attention with a soft cap or sinks is not implemented here")
    layer: Any = module.layer_idx
    out = layer_attention(layer, query, key, value, scaling, sliding_window)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)


@dataclass
class Reading:
    """Dense causal attention of one text; keeps every layer's keys and values."""

    layers: list[KeyValue] = field(default_factory=list)

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        self.layers.append((key[0], value[0]))
        if window is None:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
        outs = []
        for first in range(0, query.shape[2], WINDOW_CHUNK):
            end = min(first + WINDOW_CHUNK, query.shape[2])
            start = max(0, first - window + 1)
            distance = _positions(first, end, key)[:, None] - _positions(start, end, key)
            outs.append(
                F.scaled_dot_product_attention(
                    query[:, :, first:end],
                    key[:, :, start:end],
                    value[:, :, start:end],
                    attn_mask=(distance >= 0) & (distance < window),
                    scale=scale,
                    enable_gqa=True,
                )
            )
        return torch.cat(outs, dim=2)


def _positions(first: int, end: int, like: Tensor) -> Tensor:
    return torch.arange(first, end, device=like.device)


@dataclass(frozen=True)
class Decoding:
    """Decode steps after a text that was read: dense, or under a method and budget."""

    text: Sequence[KeyValue]
    dense_layers: int
    method: Method | None = None
    """None: full attention."""

    token_budget: int = 0

    attended: list[float] = field(default_factory=list)
    """By sparse layer, the tokens that a step and KV head attended to, on average."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        text_key, text_value = self.text[layer]
        first = text_key.shape[1]
        key, value = _append(text_key, key), _append(text_value, value)
        rows = make_rows(query, key, scale, first)
        logits = rows.logits
        num_tokens = key.shape[2]
        if window is not None:
            token = _positions(0, logits.shape[-1], key)
            logits = logits.masked_fill(token < rows.lengths[:, None] - window, -torch.inf)
        elif self.method is not None and layer >= self.dense_layers:
            attended = self._attended(rows, self.method)
            self.attended.append(attended.sum(-1, dtype=torch.float32).mean().item())
            logits = logits.masked_fill(~attended[:, :, None], -torch.inf)
        weights = logits[..., :num_tokens].softmax(-1).flatten(2, 3)
        out = (weights @ value.float()).unflatten(2, rows.query.shape[2:4])
        return out.flatten(1, 2).to(query.dtype)

    def _attended(self, rows: Rows, method: Method) -> Tensor:
        """`[streams, kv_heads, steps, tokens]` bool."""
        pages = chosen_pages(
            method.score(rows, method.page_tokens),
            rows,
            page_tokens=method.page_tokens,
            token_budget=self.token_budget,
            keep=method.keep,
            held=method.held,
        )
        return pages.repeat_interleave(method.page_tokens, dim=-1)


def _append(text: Tensor, own: Tensor) -> Tensor:
    """A text's keys, then each stream's own: `[streams, kv_heads, tokens, head_size]`."""
    return torch.cat((text.expand(len(own), -1, -1, -1), own), dim=2)


@dataclass(frozen=True)
class Decoded:
    """Of decode steps."""

    logits: Tensor
    """After each step, `[streams, steps, vocabulary]`."""

    tokens_attended: float | None
    """By a step, KV head and sparse layer, on average; None: no layer was sparse."""


class Model:
    """A checkpoint."""

    def __init__(self, folder: str, *, dense_layers: int, device: str, dtype: str) -> None:
        """
        Args:
            folder: path or name of the checkpoint.
            dense_layers: layers at the front that attend in full under every method.
            device: such as `cuda`.
            dtype: such as `bfloat16`.
        """
        # Products of bf16 keys and queries are exact in TF32; sums are fp32.
        torch.set_float32_matmul_precision("high")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=ATTENTION
        )
        self._model: Any = model.to(device).eval()
        self._dense_layers = dense_layers
        self.device = torch.device(device)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int]) -> list[KeyValue]:
        """Read a text densely. Returns every layer's keys and values."""
        reading = Reading()
        self._forward(torch.tensor([tokens]), 0, reading, last=1)
        return reading.layers

    @torch.inference_mode()
    def read_logits(self, tokens: Sequence[int], last: int) -> Tensor:
        """Logits after the last tokens of a text that is read densely, `[last, vocabulary]`."""
        return self._forward(torch.tensor([tokens]), 0, Reading(), last=last)[0]

    @torch.inference_mode()
    def decode(
        self, text: Sequence[KeyValue], streams: Tensor, method: Method | None, token_budget: int
    ) -> "Decoded":
        """Feed streams of tokens, each after the same text.

        Args:
            text: from `read`.
            streams: `[streams, steps]` token ids.
            method: how pages are chosen; None: full attention.
            token_budget: tokens attended per KV head and step.

        Returns:
            what came of it.
        """
        decoding = Decoding(text, self._dense_layers, method, token_budget)
        logits = self._forward(streams, text[0][0].shape[1], decoding, last=streams.shape[1])
        attended = decoding.attended
        return Decoded(logits, fmean(attended) if attended else None)

    def elements_per_stream(self, text: Sequence[KeyValue], num_steps: int) -> int:
        """Elements of a layer's logits that one stream has."""
        return int(self._model.config.num_attention_heads * num_steps * text[0][0].shape[1])

    def _forward(
        self, tokens: Tensor, first: int, layer_attention: Reading | Decoding, *, last: int
    ) -> Tensor:
        positions = first + torch.arange(tokens.shape[1], device=self.device)
        output = self._model(
            input_ids=tokens.to(self.device),
            position_ids=positions.expand(len(tokens), -1),
            use_cache=False,
            logits_to_keep=last,
            layer_attention=layer_attention,
        )
        logits: Tensor = output.logits
        return logits
