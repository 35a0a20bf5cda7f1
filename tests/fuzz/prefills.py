"""Tokens that a batch's prefills read, for the comparison of some with the reference."""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_quest import ops

from .ledger import Request


class PrefillToken(NamedTuple):
    """A token of a prompt, of any number in one step, which attends to all tokens before it."""

    request_id: str
    place: int
    """In the batch."""

    seq_len: int
    """Tokens that it sees, itself included."""

    blocks: list[int]


def chosen_tokens(
    request_id: str, request: Request, first_place: int, blocks: list[int]
) -> list[PrefillToken]:
    """The first and the last token of a request's step, and one between them."""
    count = request.num_scheduled
    between = random.Random(f"{request_id} {request.num_computed}").randrange(count)
    return [
        PrefillToken(request_id, first_place + at, request.num_computed + at + 1, blocks)
        for at in sorted({0, between, count - 1})
    ]


def as_rows(tokens: list[PrefillToken], device: torch.device) -> tuple[Tensor, ops.Rows]:
    """Places in the batch, `[num_rows]` int64, and rows without a budget."""
    width = max(len(token.blocks) for token in tokens)
    table = torch.zeros(len(tokens), width, dtype=torch.int32)
    for row, token in enumerate(tokens):
        table[row, : len(token.blocks)] = torch.tensor(token.blocks)
    seq_lens = torch.tensor([token.seq_len for token in tokens], dtype=torch.int32)
    budgets = torch.full_like(seq_lens, ops.UNLIMITED_PAGES)
    places = torch.tensor([token.place for token in tokens])
    rows = ops.Rows(table.to(device), seq_lens.to(device), budgets.to(device))
    return places.to(device), rows
