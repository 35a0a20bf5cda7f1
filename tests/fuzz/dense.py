"""Tokens that the dense backend attends for: which are compared with the reference, and how."""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import ChunkedLocalAttention

from vllm_quest import ops

from .ledger import Request


class DenseToken(NamedTuple):
    """A token of a prefill, or any in a layer with windows."""

    request_id: str
    place: int
    """In the batch."""

    seq_len: int
    """Tokens up to it, itself included."""

    blocks: list[int]


def chosen_tokens(
    request_id: str, request: Request, first_place: int, blocks: list[int]
) -> list[DenseToken]:
    """The first and the last token of a request's step, and one between them."""
    count = request.num_scheduled
    between = random.Random(f"{request_id} {request.num_computed}").randrange(count)
    return [
        DenseToken(request_id, first_place + at, request.num_computed + at + 1, blocks)
        for at in sorted({0, between, count - 1})
    ]


def as_rows(tokens: list[DenseToken], device: torch.device) -> ops.Rows:
    """Rows without a budget."""
    width = max(len(token.blocks) for token in tokens)
    table = torch.zeros(len(tokens), width, dtype=torch.int32)
    for row, token in enumerate(tokens):
        table[row, : len(token.blocks)] = torch.tensor(token.blocks)
    seq_lens = torch.tensor([token.seq_len for token in tokens], dtype=torch.int32)
    budgets = torch.full_like(seq_lens, ops.UNLIMITED_PAGES)
    return ops.Rows(table.to(device), seq_lens.to(device), budgets.to(device))


def first_seen_by(layer: Any, seq_lens: Tensor) -> Tensor:
    """The first token that the last of so many sees, in a layer with windows: `[num_rows]`."""
    if isinstance(layer, ChunkedLocalAttention):
        return (seq_lens - 1) // layer.attention_chunk_size * layer.attention_chunk_size
    return (seq_lens - layer.sliding_window).clamp(min=0)
