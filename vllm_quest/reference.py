"""QUEST in plain PyTorch: what each operator of `ops.py` computes, with the same arguments.

It is the specification, written to be read: loops, no batching, everything in fp64 once loaded.
Only tests and benchmarks import it. Tensors and dimension names: see `ops.py`.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_quest import layout
from vllm_quest.config import GROUP_TOKENS, Score

if TYPE_CHECKING:
    from vllm_quest.ops import KvScales, Rows

DTYPE = torch.float64
FP8 = torch.float8_e4m3fn


def tokens_per_block(kv_cache: Tensor, page_size: int, score: Score = "minmax") -> int:
    return layout.block_tokens(kv_cache.shape[2], page_size, score)


def num_pages(seq_len: int, page_size: int) -> int:
    return (seq_len + page_size - 1) // page_size


def page_rows(
    kv_cache: Tensor,
    block_table_row: Tensor,
    page: int,
    page_size: int,
    score: Score = "minmax",
) -> Tensor:
    """A page's keys|values: `[num_kv_heads, page_size, 2 * head_size]`, a view."""
    first_token = page * page_size
    block_tokens = tokens_per_block(kv_cache, page_size, score)
    block = int(block_table_row[first_token // block_tokens])
    first = first_token % block_tokens
    return kv_cache[block, :, first : first + page_size]


def page_bounds(kv_cache: Tensor, block_table_row: Tensor, page: int, page_size: int) -> Tensor:
    """A page's minimum|maximum: `[num_kv_heads, 2 * head_size]`, a view."""
    first_token = page * page_size
    block_tokens = tokens_per_block(kv_cache, page_size)
    block = int(block_table_row[first_token // block_tokens])
    page_in_block = first_token % block_tokens // page_size
    return kv_cache[block, :, block_tokens + page_in_block]


def write_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    page_size: int,
    score: Score = "minmax",
    scales: "KvScales | None" = None,
) -> None:
    if scales is not None:
        key, value = quantised(key, scales.key), quantised(value, scales.value)
    block_tokens = tokens_per_block(kv_cache, page_size, score)
    last_written: dict[tuple[int, int], int] = {}  # (block, page of the block) -> token of the page
    full_groups: set[tuple[int, int]] = set()  # (block, group of the block)
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot == -1:
            continue
        block, token = divmod(slot, block_tokens)
        kv_cache[block, :, token] = torch.cat([key[i], value[i]], dim=-1)
        page, token_of_page = divmod(token, page_size)
        last_written[block, page] = token_of_page
        group, token_of_group = divmod(token, GROUP_TOKENS)
        if token_of_group == GROUP_TOKENS - 1:
            full_groups.add((block, group))
    if score == "codes":
        for block, group in full_groups:
            update_codes(kv_cache, block, group)
        return
    for (block, page), token_of_page in last_written.items():
        update_bounds(kv_cache, block, page, token_of_page + 1, page_size, score)


def quantised(values: Tensor, scale: Tensor) -> Tensor:
    """Values as an fp8 cache stores them, at most its largest in magnitude."""
    return to_dtype(values.float() / scale, FP8)


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to the nearest. What no fp8 number reaches becomes its largest."""
    if dtype == FP8:
        values = values.clamp(-torch.finfo(FP8).max, torch.finfo(FP8).max)
    return values.to(dtype)


def update_bounds(
    kv_cache: Tensor,
    block: int,
    page: int,
    num_tokens: int,
    page_size: int,
    score: Score = "minmax",
) -> None:
    """Recompute the bounds of a block's page over its first `num_tokens` keys."""
    block_tokens = tokens_per_block(kv_cache, page_size)
    head_size = kv_cache.shape[3] // 2
    first = page * page_size
    keys = kv_cache[block, :, first : first + num_tokens, :head_size]
    bounds = torch.cat(bounds_of(keys, score), -1)
    kv_cache[block, :, block_tokens + page] = to_dtype(bounds, kv_cache.dtype)


def bounds_of(keys: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """The two bounds of `[num_kv_heads, num_tokens, head_size]`, each without `num_tokens`.

    minmax: the extremes. mean_std: mean ∓ population standard deviation. mid_dev: the middle of
    the extremes ∓ the mean absolute deviation from it.
    """
    keys = keys.to(DTYPE)
    low, high = keys.amin(dim=1), keys.amax(dim=1)
    match score:
        case "minmax":
            return low, high
        case "mean_std":
            center = keys.mean(dim=1)
            spread = keys.std(dim=1, correction=0)
        case "mid_dev":
            center = (low + high) / 2
            spread = (keys - center[:, None]).abs().mean(dim=1)
        case "codes":
            raise ValueError("codes are not made of bounds")
    return center - spread, center + spread


def group_rows(kv_cache: Tensor, block: int, group: int) -> tuple[Tensor, Tensor]:
    """A group's codes and scales, views.

    The codes as words, `[num_kv_heads, head_size / 16, GROUP_TOKENS]` int32; the scales as
    offset|step, `[num_kv_heads, 2 * head_size]`.
    """
    block_tokens = layout.block_tokens(kv_cache.shape[2], GROUP_TOKENS, "codes")
    num_words = kv_cache.shape[3] // 32
    first = block_tokens + group * layout.GROUP_ROWS
    rows = kv_cache[block, :, first : first + layout.GROUP_ROWS]
    # Of each head, all codes lie one after another.
    words = rows[:, :-1].flatten(1).view(torch.int32)[:, : num_words * GROUP_TOKENS]
    return words.view(-1, num_words, GROUP_TOKENS), rows[:, -1]


def update_codes(kv_cache: Tensor, block: int, group: int) -> None:
    """Code the keys of a full group anew."""
    head_size = kv_cache.shape[3] // 2
    first = group * GROUP_TOKENS
    keys = kv_cache[block, :, first : first + GROUP_TOKENS, :head_size]
    codes, offset, step = codes_of(keys)
    words, scales = group_rows(kv_cache, block, group)
    words.copy_(pack(codes))
    scales.copy_(torch.cat([offset, step], dim=-1))


def codes_of(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A group's codes `[num_kv_heads, GROUP_TOKENS, head_size]` int, and its offsets and steps.

    Every operation is in fp32 and in this order, so that all devices store the same bits. Products
    are with powers of two, hence exact: to fuse them with a sum changes nothing. d + d / 4 is, to
    within 0.3 %, the step that is best for Gaussian keys: 0.996 standard deviations, which are
    1.253 mean absolute deviations each.
    """
    dtype, keys = keys.dtype, keys.float()
    mean = in_order(keys) / GROUP_TOKENS
    deviation = in_order((keys - mean[:, None]).abs()) / GROUP_TOKENS
    step = (deviation + deviation / 4).to(dtype).float()
    offset = ((mean - step) - step / 2).to(dtype).float()
    above = keys - offset[:, None]
    levels = (step / 2, step + step / 2, 2 * step + step / 2)
    codes = sum((above > level[:, None]).int() for level in levels)
    assert isinstance(codes, Tensor)
    return codes, offset.to(dtype), step.to(dtype)


def in_order(values: Tensor) -> Tensor:
    """Sum `[num_kv_heads, num_tokens, head_size]` over the tokens, the first first."""
    total = torch.zeros_like(values[:, 0])
    for token in range(values.shape[1]):
        total = total + values[:, token]
    return total


def pack(codes: Tensor) -> Tensor:
    """`[num_kv_heads, GROUP_TOKENS, head_size]` -> words, see `group_rows`.

    Channel 16 w + 4 j + b goes to bits 8 b + 2 j and the next of word w.
    """
    num_kv_heads, num_tokens, head_size = codes.shape
    words = codes.new_zeros(num_kv_heads, head_size // 16, num_tokens, dtype=torch.int64)
    for channel in range(head_size):
        word, (j, b) = channel // 16, divmod(channel % 16, 4)
        words[:, word] |= codes[:, :, channel].long() << (8 * b + 2 * j)
    return words.to(torch.int32)  # the same 32 bits


def unpack(words: Tensor) -> Tensor:
    """The codes that `pack` packed."""
    num_kv_heads, num_words, num_tokens = words.shape
    codes = words.new_zeros(num_kv_heads, num_tokens, 16 * num_words, dtype=torch.int32)
    for channel in range(16 * num_words):
        word, (j, b) = channel // 16, divmod(channel % 16, 4)
        codes[:, :, channel] = (words[:, word] >> (8 * b + 2 * j)) & 3
    return codes


def coded_keys(kv_cache: Tensor, block: int, group: int) -> Tensor:
    """What a group's codes say of its keys: `[num_kv_heads, GROUP_TOKENS, head_size]` fp64."""
    words, scales = group_rows(kv_cache, block, group)
    offset, step = scales.to(DTYPE)[:, None].chunk(2, dim=-1)
    return offset + step * unpack(words)


def score(query: Tensor, kv_cache: Tensor, rows: "Rows", scores: Tensor, *, page_size: int) -> None:
    num_rows, num_heads, head_size = query.shape
    group_size = num_heads // kv_cache.shape[1]
    for row in range(num_rows):
        pages = num_pages(int(rows.seq_lens[row]), page_size)
        if pages <= int(rows.budget_pages[row]):
            continue
        for page in range(pages):
            bounds = page_bounds(kv_cache, rows.block_table[row], page, page_size).to(DTYPE)
            low = bounds[:, :head_size].repeat_interleave(group_size, dim=0)
            high = bounds[:, head_size:].repeat_interleave(group_size, dim=0)
            q = query[row].to(DTYPE)
            per_head = torch.maximum(q * low, q * high).sum(dim=-1)
            scores[row, :, page] = per_head.view(-1, group_size).amax(dim=-1)


def score_codes(
    query: Tensor,
    kv_cache: Tensor,
    rows: "Rows",
    masses: Tensor,
    scores: Tensor,
    *,
    page_size: int,
    scale: float,
    soft_cap: float = 0.0,
) -> None:
    num_rows, _, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    block_groups = tokens_per_block(kv_cache, page_size, "codes") // GROUP_TOKENS
    for row in range(num_rows):
        seq_len = int(rows.seq_lens[row])
        pages = num_pages(seq_len, page_size)
        if pages <= int(rows.budget_pages[row]):
            continue
        keys = []  # of each group, [num_kv_heads, its tokens, head_size]
        for group in range(num_pages(seq_len, GROUP_TOKENS)):
            block = int(rows.block_table[row, group // block_groups])
            first = group % block_groups * GROUP_TOKENS
            tokens = min(GROUP_TOKENS, seq_len - group * GROUP_TOKENS)
            if tokens == GROUP_TOKENS:
                keys.append(coded_keys(kv_cache, block, group % block_groups))
            else:
                keys.append(kv_cache[block, :, first : first + tokens, :head_size].to(DTYPE))
        # [num_kv_heads, group_size, head_size]
        q = query[row].to(DTYPE).view(num_kv_heads, -1, head_size)
        logits = capped(q @ torch.cat(keys, dim=1).transpose(1, 2) * scale, soft_cap)
        of_pages = torch.split(logits, page_size, dim=-1)
        mass = torch.stack([torch.logsumexp(page, dim=-1) for page in of_pages], -1) / math.log(2)
        masses[row, :, :pages] = mass.flatten(0, 1)
        total = torch.logsumexp(mass * math.log(2), dim=-1, keepdim=True) / math.log(2)
        scores[row, :, :pages] = (mass - total).amax(dim=1)
        for page in range(seq_len // GROUP_TOKENS * GROUP_TOKENS // page_size, pages):
            scores[row, :, page] = 2.0**102 * (2**23 + page)


def select(
    scores: Tensor,
    rows: "Rows",
    pages: Tensor,
    *,
    page_size: int,
    keep_first_pages: int = 0,
    keep_newest_percent: int = 0,
) -> None:
    num_rows, num_kv_heads, _ = scores.shape
    for row in range(num_rows):
        all_pages = list(range(num_pages(int(rows.seq_lens[row]), page_size)))
        budget = int(rows.budget_pages[row])
        if len(all_pages) <= budget:
            continue
        num_newest = max(1, budget * keep_newest_percent // 100)
        num_first = min(keep_first_pages, budget - num_newest)
        kept = all_pages[:num_first] + all_pages[-num_newest:]
        competing = all_pages[num_first:-num_newest]
        for head in range(num_kv_heads):
            values = scores[row, head].tolist()
            best_first = sorted(competing, key=lambda page: (-values[page], page))
            chosen = sorted(kept + best_first[: budget - len(kept)])
            pages[row, head, :budget] = torch.tensor(chosen, dtype=pages.dtype)


def sparse_decode(
    query: Tensor,
    kv_cache: Tensor,
    rows: "Rows",
    pages: Tensor,
    out: Tensor,
    *,
    page_size: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    workspace: Tensor | None = None,
    counters: Tensor | None = None,
    score: Score = "minmax",
    scales: "KvScales | None" = None,
) -> None:
    num_rows, num_heads, _ = query.shape
    num_kv_heads = kv_cache.shape[1]
    group_size = num_heads // num_kv_heads
    for row in range(num_rows):
        seq_len, budget = int(rows.seq_lens[row]), int(rows.budget_pages[row])
        if seq_len == 0:
            out[row] = 0
            continue
        for head in range(num_kv_heads):
            all_pages = list(range(num_pages(seq_len, page_size)))
            is_sparse = len(all_pages) > budget
            attended = pages[row, head, :budget].tolist() if is_sparse else all_pages
            if counters is not None:
                scored = len(all_pages) if is_sparse else 0
                counters += torch.tensor(
                    [is_sparse, not is_sparse, scored, len(attended), len(all_pages)]
                )
            keys_values = torch.cat(
                [
                    page_rows(kv_cache, rows.block_table[row], page, page_size, score)[
                        head, : min(page_size, seq_len - page * page_size)
                    ]
                    for page in attended
                ]
            )
            heads = slice(head * group_size, (head + 1) * group_size)
            group_sinks = None if sinks is None else sinks[heads]
            keys_values = unscaled(keys_values, scales)
            attention = attend(query[row, heads], keys_values, scale, soft_cap, group_sinks)
            out[row, heads] = attention.to(out.dtype)


def unscaled(keys_values: Tensor, scales: "KvScales | None") -> Tensor:
    """`[..., 2 * head_size]` of a cache as fp64 keys|values."""
    keys_values = keys_values.to(DTYPE)
    if scales is None:
        return keys_values
    key, value = keys_values.chunk(2, dim=-1)
    return torch.cat([key * scales.key.to(DTYPE), value * scales.value.to(DTYPE)], dim=-1)


def attend(
    query: Tensor, keys_values: Tensor, scale: float, soft_cap: float, sinks: Tensor | None
) -> Tensor:
    """Softmax of `[group_size, head_size]` over `[num_tokens, 2 * head_size]`, in fp64.

    A sink, of `[group_size]`, is one more logit, of a token whose value is 0.
    """
    key, value = keys_values.to(DTYPE).chunk(2, dim=-1)
    logits = capped(query.to(DTYPE) @ key.T * scale, soft_cap)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None].to(DTYPE)], dim=-1)
        value = torch.cat([value, torch.zeros_like(value[:1])])
    return torch.softmax(logits, dim=-1) @ value


def capped(logits: Tensor, soft_cap: float) -> Tensor:
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap > 0 else logits


def full_attention(
    query: Tensor,
    kv_cache: Tensor,
    rows: "Rows",
    *,
    page_size: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    score: Score = "minmax",
    scales: "KvScales | None" = None,
) -> Tensor:
    """Attention over every token of every row, `[num_rows, num_heads, head_size]` fp64.

    It knows nothing of pages' bounds or selection.
    """
    num_rows, num_heads, head_size = query.shape
    block_tokens = tokens_per_block(kv_cache, page_size, score)
    num_kv_heads = kv_cache.shape[1]
    group_size = num_heads // num_kv_heads
    out = torch.zeros(num_rows, num_heads, head_size, dtype=DTYPE)
    for row in range(num_rows):
        seq_len = int(rows.seq_lens[row])
        if seq_len == 0:
            continue
        blocks = rows.block_table[row, : (seq_len + block_tokens - 1) // block_tokens].long()
        tokens = kv_cache[blocks, :, :block_tokens].transpose(1, 2).flatten(0, 1)[:seq_len]
        for head in range(num_heads):
            keys_values = unscaled(tokens[:, head // group_size], scales)
            one = slice(head, head + 1)
            own_sink = None if sinks is None else sinks[one]
            out[row, one] = attend(query[row, one], keys_values, scale, soft_cap, own_sink)
    return out
