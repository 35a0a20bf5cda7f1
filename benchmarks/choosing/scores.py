"""Page scores: how much a page seems to matter to a step, `[streams, kv_heads, steps, pages]` fp32.

Only full pages are compared, and by scores that need a full block only pages of full blocks: the
others are kept (`selection.py`). A score may therefore hold anything for a page that is not full.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.choosing.rows import BLOCK_TOKENS, Rows, product

Score = Callable[[Rows, int], Tensor]
"""(rows, page_tokens) -> scores."""

Rank = Literal["mass", "mass of coded keys", "mass without totals", "maximum"]
Levels = Literal["gaussian", "even"]

BOUND_STEPS = 15
"""Of the range of a block and channel, for bounds in 4 bits."""

GAUSSIAN_LEVELS = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}
"""By bits: positive levels of the least mean square error (Max 1960), in deviations."""

EVEN_STEPS = {1: 1.596, 2: 0.996, 4: 0.3352}
"""By bits: the distance between evenly spaced levels of the least mean square error."""


def minmax(rows: Rows, page_tokens: int) -> Tensor:
    """QUEST's: an upper bound of q·k from each channel's minimum and maximum (arXiv 2406.10774)."""
    pages = rows.key.unflatten(2, (-1, page_tokens))
    return _bound(rows, pages.amin(3), pages.amax(3))


def minmax_4_bits(rows: Rows, page_tokens: int) -> Tensor:
    """The same bound; minimum and maximum in 4 bits of their block's range, rounded outwards."""
    return _bound(rows, *bounds_4_bits(rows.key, page_tokens))


def bounds_4_bits(key: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds `[streams, kv_heads, pages, head_size]` of padded keys."""
    # [streams, kv_heads, blocks, pages of a block, page_tokens, head_size]
    pages = key.unflatten(2, (-1, BLOCK_TOKENS // page_tokens, page_tokens))
    page_low, page_high = pages.amin(4), pages.amax(4)
    low, high = page_low.amin(3, keepdim=True), page_high.amax(3, keepdim=True)
    step = ((high - low) / BOUND_STEPS).clamp(min=torch.finfo(torch.float32).tiny)
    rounded_low = low + ((page_low - low) / step).floor() * step
    rounded_high = low + ((page_high - low) / step).ceil() * step
    return rounded_low.flatten(2, 3), rounded_high.flatten(2, 3)


def _bound(rows: Rows, low: Tensor, high: Tensor) -> Tensor:
    positive, negative = rows.query.clamp(min=0), rows.query.clamp(max=0)
    return (product(positive, high) + product(negative, low)).amax(2)


def coded_keys(key: Tensor, bits: int, levels: Levels) -> Tensor:
    """Keys as their codes tell them, of the key's shape.

    A block of 128 tokens has, per channel, a mean and a deviation in bf16; a code of `bits` bits
    names the nearest of 2^bits levels, in deviations from the mean.
    """
    blocks = key.unflatten(2, (-1, BLOCK_TOKENS))
    mean = blocks.mean(3, keepdim=True)
    deviation = (blocks - mean).square().mean(3, keepdim=True).sqrt().bfloat16().float()
    mean = mean.bfloat16().float()
    deviation = deviation.clamp(min=torch.finfo(torch.float32).tiny)
    values = _levels(bits, levels, key.device)
    codes = torch.bucketize((blocks - mean) / deviation, (values[1:] + values[:-1]) / 2)
    return (mean + deviation * values[codes]).flatten(2, 3)


def _levels(bits: int, levels: Levels, device: torch.device) -> Tensor:
    if levels == "even":
        numbers = torch.arange(2**bits, dtype=torch.float32, device=device)
        return (numbers - (2**bits - 1) / 2) * EVEN_STEPS[bits]
    positive = torch.tensor(GAUSSIAN_LEVELS[bits], device=device)
    return torch.cat((-positive.flip(0), positive))


def keys_in_bits(bits: int, rank: Rank, levels: Levels = "gaussian") -> Score:
    """A score by estimated logits; the unfinished block's are exact, for the heads' totals."""
    return partial(_by_coded_keys, bits=bits, rank=rank, levels=levels)


def _by_coded_keys(
    rows: Rows, page_tokens: int, *, bits: int, rank: Rank, levels: Levels
) -> Tensor:
    estimate = rows.product(coded_keys(rows.key, bits, levels))
    if rank == "mass of coded keys":
        estimate.masked_fill_(~rows.is_in_full_block, -torch.inf)
        return by_mass(estimate, page_tokens)
    estimate = torch.where(rows.is_in_full_block, estimate, rows.logits)
    rankings = {"mass": by_mass, "mass without totals": by_sum, "maximum": by_maximum}
    return rankings[rank](estimate, page_tokens)


def true_maximum(rows: Rows, page_tokens: int) -> Tensor:
    """Oracle: the largest q·k of a page."""
    return by_maximum(rows.logits, page_tokens)


def true_mass(rows: Rows, page_tokens: int) -> Tensor:
    """Oracle: a page's share of a head's attention to everything, of its group the largest."""
    return by_mass(rows.logits, page_tokens)


def newest(rows: Rows, page_tokens: int) -> Tensor:
    """The later the better (StreamingLLM, arXiv 2309.17453; tokens keep their positions)."""
    streams, kv_heads, num_tokens, _ = rows.key.shape
    pages = torch.arange(num_tokens // page_tokens, device=rows.key.device).float()
    return pages.expand(streams, kv_heads, len(rows.lengths), -1)


def by_mass(logits: Tensor, page_tokens: int) -> Tensor:
    """Logarithm of the largest share, over the group, of a head's attention that a page holds."""
    of_page = logits.unflatten(-1, (-1, page_tokens)).logsumexp(-1)
    return (of_page - of_page.logsumexp(-1, keepdim=True)).amax(2)


def by_sum(logits: Tensor, page_tokens: int) -> Tensor:
    """Logarithm of the largest sum of exponentials, over the group: heads without their totals."""
    return logits.unflatten(-1, (-1, page_tokens)).logsumexp(-1).amax(2)


def by_maximum(logits: Tensor, page_tokens: int) -> Tensor:
    """The largest logit over tokens and group."""
    return logits.unflatten(-1, (-1, page_tokens)).amax((2, -1))
