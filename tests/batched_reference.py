"""The reference for many rows at once: what `vllm_quest/reference.py` says, without its loops.

For the fuzzer, which compares every decode row of a running engine. `tests/test_fuzz.py` holds it
to the reference. Everything is in fp64 once loaded, and on the cache's own device; tensors and
dimension names: see `ops.py`.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batch import FP8, FP32_ROUNDOFF, UNIT_ROUNDOFF, largest
from vllm_quest import layout, ops, reference
from vllm_quest.config import GROUP_TOKENS, Score

DTYPE = torch.float64
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Blocks:
    """The blocks that some rows read, once each."""

    cache: Tensor  # [num_blocks, num_kv_heads, block_rows, 2 * head_size], dtype of the cache
    numbers: Tensor  # [num_blocks] int64: where they are in the engine's cache, ascending
    table: Tensor  # [num_rows, max_blocks] int64 into `cache`; 0 past a row's end
    seq_lens: Tensor  # [num_rows] int64
    page_size: int
    score: Score
    scales: ops.KvScales | None = None  # of an fp8 cache

    @classmethod
    def of(
        cls,
        kv_cache: Tensor,
        rows: ops.Rows,
        page_size: int,
        score: Score,
        scales: ops.KvScales | None = None,
        *,
        has_bounds: bool = True,
    ) -> "Blocks":
        """Gather them from an engine's cache; one without bounds is given zeros for them."""
        block_tokens = kv_cache.shape[2]
        if has_bounds:
            block_tokens = reference.tokens_per_block(kv_cache, page_size, score)
        seq_lens = rows.seq_lens.long()
        num_blocks = -(-seq_lens // block_tokens)
        width = max(1, int(num_blocks.max()))
        is_read = torch.arange(width, device=kv_cache.device) < num_blocks[:, None]
        table = rows.block_table[:, :width].long()
        numbers = torch.unique(table[is_read])
        table = torch.searchsorted(numbers, table).where(is_read, 0)
        cache = gathered(kv_cache, numbers)
        if not has_bounds:
            cache = torch.nn.functional.pad(cache, (0, 0, 0, block_tokens // page_size))
        return cls(cache, numbers, table, seq_lens, page_size, score, scales)

    @property
    def device(self) -> torch.device:
        return self.cache.device

    @property
    def block_tokens(self) -> int:
        return reference.tokens_per_block(self.cache, self.page_size, self.score)

    @property
    def block_pages(self) -> int:
        return self.block_tokens // self.page_size

    @property
    def num_pages(self) -> Tensor:
        """[num_rows] int64."""
        return -(-self.seq_lens // self.page_size)

    @property
    def max_pages(self) -> int:
        return max(1, int(self.num_pages.max()))

    def tokens_filled(self, filled: dict[int, int]) -> Tensor:
        """`[num_blocks]` int64: tokens that hold keys, by the block's number in the engine."""
        tokens = [filled[number] for number in self.numbers.tolist()]
        return torch.tensor(tokens, device=self.device)

    def part(self, rows: Tensor) -> "Blocks":
        """The same blocks for some of the rows, `[num_rows]` int64."""
        return replace(self, table=self.table[rows], seq_lens=self.seq_lens[rows])

    def pages(self) -> Tensor:
        """`[max_pages]` int64: their numbers."""
        return torch.arange(self.max_pages, device=self.device)

    def keys(self) -> Tensor:
        """`[num_blocks, num_kv_heads, block_tokens, head_size]`, as they are stored."""
        return exact(self.cache[:, :, : self.block_tokens, : self.cache.shape[3] // 2])


def bits(values: Tensor) -> Tensor:
    """The same elements as integers, a view."""
    return values.view(BITS[values.element_size()])


def gathered(kv_cache: Tensor, numbers: Tensor) -> Tensor:
    """Some blocks of a cache of any dtype, a copy."""
    return bits(kv_cache)[numbers].view(kv_cache.dtype)


def exact(values: Tensor) -> Tensor:
    """fp8 as fp32, which PyTorch can compute with; the rest as it is."""
    return values.float() if values.dtype == FP8 else values


def bounds(blocks: Blocks, filled: Tensor) -> Tensor:
    """The bounds that blocks should have over their first `filled` tokens, where there are any.

    `[num_blocks, num_kv_heads, block_pages, 2 * head_size]`, numbers of the cache's dtype, see
    `exact`; NaN in pages that hold nothing.
    """
    page_size, keys = blocks.page_size, blocks.keys()
    keys = keys.unflatten(2, (-1, page_size))  # [blocks, heads, pages, page_size, head_size]
    token = torch.arange(blocks.block_tokens, device=blocks.device).view(1, 1, -1, page_size, 1)
    is_filled = token < filled.view(-1, 1, 1, 1, 1)
    low, high = keys.amin(3), keys.amax(3)
    # Of each block, the page that is filled in part, if any, has garbage behind.
    block = torch.arange(len(filled), device=blocks.device)
    page = (filled // page_size).clamp(max=keys.shape[2] - 1)
    last = keys[block, :, page]  # [blocks, heads, page_size, head_size]
    is_last_filled = is_filled[block, :, page]
    is_partly = (filled % page_size > 0).view(-1, 1, 1)
    low_of_last = last.masked_fill(~is_last_filled, torch.inf).amin(2)
    high_of_last = last.masked_fill(~is_last_filled, -torch.inf).amax(2)
    low[block, :, page] = low_of_last.where(is_partly, low[block, :, page])
    high[block, :, page] = high_of_last.where(is_partly, high[block, :, page])
    if blocks.score != "minmax":
        keys, count = keys.to(DTYPE), is_filled.sum(3).clamp(min=1)
        if blocks.score == "mean_std":
            center = keys.where(is_filled, 0.0).sum(3) / count
            squares = (keys - center.unsqueeze(3)).where(is_filled, 0.0) ** 2
            spread = (squares.sum(3) / count).sqrt()
        else:
            center = (low.to(DTYPE) + high.to(DTYPE)) / 2
            spread = (keys - center.unsqueeze(3)).abs().where(is_filled, 0.0).sum(3) / count
        low, high = (
            exact(reference.to_dtype(side, blocks.cache.dtype))
            for side in (center - spread, center + spread)
        )
    both = torch.cat([low, high], dim=-1)
    return both.masked_fill(~is_filled[:, :, :, :1, 0], torch.nan)


def stored_bounds(blocks: Blocks) -> Tensor:
    """What the cache has in their place, a view."""
    return blocks.cache[:, :, blocks.block_tokens :]


def groups(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Codes as words, and offset|step: see `reference.group_rows`, for all groups of all blocks.

    `[num_groups, num_kv_heads, head_size / 16, GROUP_TOKENS]` int32 and
    `[num_groups, num_kv_heads, 2 * head_size]`.
    """
    rows = blocks.cache[:, :, blocks.block_tokens :].unflatten(2, (-1, layout.GROUP_ROWS))
    rows = rows.transpose(1, 2).flatten(0, 1)  # [groups, heads, GROUP_ROWS, 2 * head_size]
    num_words = rows.shape[3] // 32
    words = rows[:, :, :-1].flatten(2).contiguous().view(torch.int32)
    words = words[..., : num_words * GROUP_TOKENS].unflatten(2, (num_words, GROUP_TOKENS))
    return words, rows[:, :, -1]


def group_keys(blocks: Blocks) -> Tensor:
    """`[num_groups, num_kv_heads, GROUP_TOKENS, head_size]`."""
    return blocks.keys().unflatten(2, (-1, GROUP_TOKENS)).transpose(1, 2).flatten(0, 1)


def codes_differ(blocks: Blocks, filled: Tensor) -> Tensor:
    """`[num_groups]` bool: full groups whose codes or scales are not those of their keys."""
    starts = torch.arange(0, blocks.block_tokens, GROUP_TOKENS, device=blocks.device)
    is_full = (filled[:, None] >= starts + GROUP_TOKENS).flatten()
    differ = torch.zeros_like(is_full)
    if not is_full.any():
        return differ
    keys = group_keys(blocks)[is_full]
    codes, offset, step = reference.codes_of(keys.flatten(0, 1))
    expected = reference.pack(codes).unflatten(0, keys.shape[:2])
    words, scales = groups(blocks)
    expected_scales = torch.cat([offset, step], -1).unflatten(0, keys.shape[:2])
    differ[is_full] = (words[is_full] != expected).flatten(1).any(1) | (
        scales[is_full] != expected_scales
    ).flatten(1).any(1)
    return differ


def by_kv_head(query: Tensor, num_kv_heads: int) -> Tensor:
    """`[num_rows, num_kv_heads, group_size, head_size]` fp64."""
    return query.to(DTYPE).unflatten(1, (num_kv_heads, -1))


def score(query: Tensor, blocks: Blocks) -> Tensor:
    """`[num_rows, num_kv_heads, max_pages]` fp64; what lies past a row's end means nothing."""
    of_blocks = stored_bounds(blocks).to(DTYPE)
    of_rows = of_blocks[blocks.table]  # [rows, blocks, heads, pages, 2 * head_size]
    of_rows = of_rows.transpose(1, 2).flatten(2, 3)[:, :, : blocks.max_pages]
    low, high = of_rows.unsqueeze(2).chunk(2, dim=-1)
    q = by_kv_head(query, blocks.cache.shape[1]).unsqueeze(3)
    return torch.maximum(q * low, q * high).sum(-1).amax(2)


def score_codes(query: Tensor, blocks: Blocks, *, scale: float, soft_cap: float) -> Tensor:
    """The same for the score `codes`."""
    words, scales = groups(blocks)
    offset, step = scales.to(DTYPE).unsqueeze(2).chunk(2, dim=-1)
    codes = reference.unpack(words.flatten(0, 1)).unflatten(0, words.shape[:2])
    coded = (offset + step * codes).unflatten(0, (len(blocks.cache), -1))
    coded = coded.transpose(1, 2).flatten(2, 3)  # [blocks, heads, block_tokens, head_size]
    keys = _of_rows(blocks, coded)
    exact = _of_rows(blocks, blocks.keys().to(DTYPE))
    token = torch.arange(keys.shape[2], device=blocks.device)
    tokens_coded = blocks.seq_lens // GROUP_TOKENS * GROUP_TOKENS
    keys = keys.where((token < tokens_coded[:, None]).view(-1, 1, len(token), 1), exact)
    q = by_kv_head(query, blocks.cache.shape[1])
    logits = reference.capped(q @ keys.transpose(2, 3) * scale, soft_cap)
    beyond = (token >= blocks.seq_lens[:, None]).view(-1, 1, 1, len(token))
    logits = logits.masked_fill(beyond, -torch.inf)
    mass = torch.logsumexp(logits.unflatten(-1, (-1, blocks.page_size)), -1) / math.log(2)
    total = torch.logsumexp(mass * math.log(2), -1, keepdim=True) / math.log(2)
    scores = (mass - total).amax(2)[:, :, : blocks.max_pages]
    page = blocks.pages()
    is_coded = page < (tokens_coded // blocks.page_size)[:, None]
    return scores.where(is_coded.unsqueeze(1), 2.0**102 * (2.0**23 + page))


def _of_rows(blocks: Blocks, of_blocks: Tensor) -> Tensor:
    """`[num_blocks, num_kv_heads, block_tokens, n]` -> `[num_rows, num_kv_heads, tokens, n]`."""
    return of_blocks[blocks.table].transpose(1, 2).flatten(2, 3)


def select(
    scores: Tensor, blocks: Blocks, budget_pages: Tensor, *, keep_first: int, keep_newest: int
) -> tuple[Tensor, Tensor]:
    """Which pages are chosen, and by how much: for rows over their budget.

    Args:
        scores: `[num_rows, num_kv_heads, >= max_pages]`.
        blocks: of the rows.
        budget_pages: `[num_rows]`.
        keep_first: `keep_first_pages` of `ops.select`.
        keep_newest: `keep_newest_percent` of `ops.select`.

    Returns:
        `[num_rows, num_kv_heads, max_pages]` bool, and `[num_rows]`: the smallest lead, of any KV
        head, of the lowest score chosen over the highest that was not; infinite where no choice is.
    """
    num_pages, budget = blocks.num_pages[:, None, None], budget_pages.long()[:, None, None]
    page = blocks.pages()
    num_newest = (budget * keep_newest // 100).clamp(min=1)
    num_first = (budget - num_newest).clamp(max=keep_first)
    is_kept = (page < num_first) | (page >= num_pages - num_newest)
    scores = scores[:, :, : len(page)].to(DTYPE)
    scores = scores.masked_fill(is_kept, torch.inf).masked_fill(page >= num_pages, -torch.inf)
    ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, page.expand_as(order).contiguous())
    last = budget.clamp(max=len(page) - 1).expand(-1, scores.shape[1], -1)
    leads = ordered.gather(-1, last - 1) - ordered.gather(-1, last)
    leads = leads.nan_to_num(torch.inf, posinf=torch.inf).amin((1, 2))
    return rank < budget, leads


def attention(
    query: Tensor,
    blocks: Blocks,
    is_attended: Tensor,
    *,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    rounds_weights: bool = False,
    first_seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over some pages, and how far fp32 and the output's dtype may be from it.

    Both `[num_rows, num_heads, head_size]` fp64. The error is `batch.decode_error`'s, with what
    each row and head has in place of the largest query, key and value of all: a logit's products
    sum to Σ |q_d k_d| at most. The GPU's matrix unit truncates their sums, at two roundings each.

    Args:
        query: `[num_rows, num_heads, head_size]`.
        blocks: of the rows.
        is_attended: `[num_rows, num_kv_heads, >= max_pages]` bool.
        scale: factor of q·k.
        soft_cap: see `ops.sparse_decode`.
        sinks: `[num_heads]`, see `ops.sparse_decode`.
        rounds_weights: whether weights are rounded to the model's dtype before they multiply
            values, as by GPUs (csrc/cuda/attention.cuh, `weigh`) and by prefill on any device.
        first_seen: `[num_rows]`, the first token that a row sees in a layer with windows.
    """
    _, num_kv_heads, _, width = blocks.cache.shape
    pages_in_cache = blocks.cache[:, :, : blocks.block_tokens]
    pages_in_cache = exact(pages_in_cache).reshape(-1, blocks.page_size, width)
    is_attended = is_attended[..., : blocks.max_pages] & (
        blocks.pages() < blocks.num_pages[:, None, None]
    )
    count = is_attended.sum(-1)  # [rows, heads]
    # The pages of each row and head, those attended first.
    order = torch.sort((~is_attended).byte(), dim=-1, stable=True).indices
    pages = order[..., : max(1, int(count.max()))]
    row = torch.arange(len(pages), device=blocks.device).view(-1, 1, 1)
    head = torch.arange(num_kv_heads, device=blocks.device).view(1, -1, 1)
    block = blocks.table[row, pages // blocks.block_pages]
    place = (block * num_kv_heads + head) * blocks.block_pages + pages % blocks.block_pages
    keys_values = pages_in_cache[place]  # [rows, heads, pages, page_size, 2 * head_size]
    keys_values = reference.unscaled(keys_values, blocks.scales)
    place_in_page = torch.arange(blocks.page_size, device=blocks.device)
    token = pages.unsqueeze(-1) * blocks.page_size + place_in_page
    is_seen = token < blocks.seq_lens.view(-1, 1, 1, 1)
    if first_seen is not None:
        is_seen &= token >= first_seen.view(-1, 1, 1, 1)
    is_seen &= (blocks.pages()[: pages.shape[-1]] < count.unsqueeze(-1)).unsqueeze(-1)
    is_seen = is_seen.flatten(2)  # [rows, heads, tokens]
    keys_values = keys_values.flatten(2, 3).masked_fill(~is_seen.unsqueeze(-1), 0.0)
    key, value = keys_values.chunk(2, dim=-1)
    logits = by_kv_head(query, num_kv_heads) @ key.transpose(2, 3) * scale
    logits = reference.capped(logits, soft_cap).masked_fill(~is_seen.unsqueeze(2), -torch.inf)
    if sinks is not None:
        of_heads = sinks.detach().to(DTYPE).view(1, num_kv_heads, -1, 1)
        logits = torch.cat([logits, of_heads.expand(*logits.shape[:3], 1)], dim=-1)
        value = torch.cat([value, torch.zeros_like(value[:, :, :1])], dim=2)
    out = torch.softmax(logits, dim=-1).nan_to_num(0.0) @ value  # a row of length 0 sees nothing
    size = (by_kv_head(query, num_kv_heads).abs() @ key.abs().transpose(2, 3)).amax(-1) * scale
    logit_roundings = (2 if query.is_cuda else 1) * key.shape[-1] + 8
    logit_error = logit_roundings * FP32_ROUNDOFF * (size + soft_cap)
    if sinks is not None:
        logit_error += 8 * FP32_ROUNDOFF * largest(sinks.nan_to_num(neginf=0.0))
    roundings = 2 * blocks.seq_lens.view(-1, 1, 1) + 8
    weight_error = 2 * logit_error + roundings * FP32_ROUNDOFF
    error = weight_error.unsqueeze(-1) * value.abs().amax((2, 3)).view(*count.shape, 1, 1)
    error = error + UNIT_ROUNDOFF[query.dtype] * out.abs()
    if query.dtype == torch.float16:
        error += 2.0**-24
    if query.is_cuda or rounds_weights:
        # With fp8 caches to fp16, which is nearer.
        u = UNIT_ROUNDOFF[query.dtype]
        error = (1 + u) * (
            error + u * (torch.softmax(logits, dim=-1).nan_to_num(0.0) @ value.abs())
        )
    return out.flatten(1, 2), error.flatten(1, 2)
