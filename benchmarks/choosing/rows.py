"""The query rows of one layer, each with the keys before it."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_TOKENS = 128
"""Tokens of a block of the cache: quantised statistics share a range within it."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Decode steps of several streams. A stream is a text of its own; its steps see their past."""

    query: Tensor  # [streams, kv_heads, group, steps, head_size] fp32, scaled
    key: Tensor  # [streams, kv_heads, tokens, head_size] fp32; tokens: a multiple of BLOCK_TOKENS
    lengths: Tensor  # [steps] int64, tokens that a step sees, its own included

    @cached_property
    def logits(self) -> Tensor:
        """`[streams, kv_heads, group, steps, tokens]` fp32; -inf for what comes later."""
        token = torch.arange(self.key.shape[2], device=self.key.device)
        return self.product(self.key).masked_fill_(token >= self.lengths[:, None], -math.inf)

    def product(self, vectors: Tensor) -> Tensor:
        """Query times `[streams, kv_heads, n, d]`, `[streams, kv_heads, group, steps, n]`."""
        return product(self.query, vectors)

    @property
    def is_in_full_block(self) -> Tensor:
        """`[steps, tokens]` bool: whether a token's block is full at a step."""
        token = torch.arange(self.key.shape[2], device=self.key.device)
        return token < (self.lengths // BLOCK_TOKENS * BLOCK_TOKENS)[:, None]


def product(query: Tensor, vectors: Tensor) -> Tensor:
    """As `Rows.product`, of any query of its shape."""
    flat: Tensor = query.flatten(2, 3) @ vectors.mT
    return flat.unflatten(2, query.shape[2:4])


def make_rows(query: Tensor, key: Tensor, scale: float, first: int) -> Rows:
    """Rows from what a layer computes.

    Args:
        query: `[streams, heads, steps, head_size]`.
        key: `[streams, kv_heads, tokens, head_size]`, the steps' own last.
        scale: factor of q·k.
        first: position of the first step.
    """
    grouped = query.unflatten(1, (key.shape[1], -1)).float() * scale
    lengths = first + 1 + torch.arange(query.shape[2], device=query.device)
    padding = -key.shape[2] % BLOCK_TOKENS
    return Rows(grouped, F.pad(key.float(), (0, 0, 0, padding)), lengths)
