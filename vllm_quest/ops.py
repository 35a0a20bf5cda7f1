"""Typed wrappers of the compiled operators `torch.ops.vllm_quest.*`, one per stage.

The same operators exist for CPU and CUDA, but for `weigh_pages` and `cluster_decode`, which GPUs
have alone. `vllm_quest/reference.py` says in plain PyTorch what each computes; `csrc/README.md`
says how.

Dimension names, used in Python and C++ alike:

    num_rows       decode rows: one query token each, with its own page-table row and length
    num_heads      query heads; num_heads = num_kv_heads * group_size
    block_tokens   tokens of a vLLM block (N); page_size divides it
    block_rows     rows of a block: block_tokens keys|values, then block_tokens / page_size bounds
                   or, for the score `codes`, 9 for each group of 128 tokens (`layout`)
    max_pages      capacity in pages: max_blocks * block_tokens / page_size

`kv_cache` is `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`, fp16, bf16, fp32 (CPU) or fp8
(float8_e4m3fn, GPU). The model's dtype is that of the cache; with fp8 it is bf16, and the cache has
scales (`KvScales`). Row r < block_tokens holds key|value of token r, row block_tokens + p holds
minimum|maximum of the keys of page p. (block, head) pages are contiguous; the two outer strides are
free.

For the score `codes` (`csrc/codes.h`), rows block_tokens + 9 g and the next 7 hold the codes of
group g, tokens 128 g onwards: the 32-bit word w * 128 + t of them has channels 16 w to 16 w + 15 of
token t, channel 16 w + 4 j + b in bits 8 b + 2 j and the next. An fp32 cache leaves the last 4 of
these rows as they are. The ninth row holds offset|step of each channel: a key element is about
offset + step * code. A group has codes once its last token was written.

The pages of a row are numbered by position: page j covers tokens j * page_size onwards and lies in
block `block_table[row, j * page_size // block_tokens]`. A row with no more pages than its budget is
attended in full: `score` and `select` skip it, and `sparse_decode` never reads its list of pages.
A row of length 0 is padding: none of its memory is read, and its output is 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_quest import extension
from vllm_quest.config import Score

for _device in extension.LIBRARIES:
    if extension.library(_device).exists() and (_device == "cpu" or torch.version.cuda):
        extension.load(_device)

UNLIMITED_PAGES = torch.iinfo(torch.int32).max
"""A budget that every context fits."""

UNSETTLED_PAGES = int(torch.ops.vllm_quest.contract("unsettled_pages"))
"""The budget of a row that is attended in full and may read pages that another request writes in
this step, see `cluster_decode`. Every context fits it too."""

GROWING_PAGES = int(torch.ops.vllm_quest.contract("growing_pages"))
"""Pages at a row's end that its own request may write in a step, see `cluster_decode`."""

MAX_GROUP_SIZE = int(torch.ops.vllm_quest.contract("max_group_size"))
"""Query heads per KV head that the GPU operators take."""


@dataclass(frozen=True)
class Rows:
    """Where decode rows find their pages, and how many they may read. Slices like a list."""

    block_table: Tensor
    """[num_rows, max_blocks] int32; entries past a row's length are never read."""

    seq_lens: Tensor
    """[num_rows] int32, tokens, the row's own token included; 0 in padding."""

    budget_pages: Tensor
    """[num_rows] int32, pages, at least 1."""

    def __len__(self) -> int:
        return len(self.seq_lens)

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(self.block_table[part], self.seq_lens[part], self.budget_pages[part])


@dataclass(frozen=True)
class KvScales:
    """What the elements of an fp8 cache are multiplied with to be keys and values.

    Read on the device, at every launch.
    """

    key: Tensor
    """One number, fp32."""

    value: Tensor
    """One number, fp32."""


def _both(scales: KvScales | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    return (None, None) if scales is None else (scales.key, scales.value)


def write_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    page_size: int,
    score: Score = "minmax",
    scales: KvScales | None = None,
) -> None:
    """Store keys and values in their slots, then recompute what pages are scored by.

    An fp8 cache stores them divided by their scale, rounded to the nearest (ties to even), and at
    most 448 in magnitude: the bits of vLLM's `reshape_and_cache_flash`. Bounds are of what is
    stored, so minimum and maximum are exact.

    The bounds are taken anew over the page's filled tokens: those up to the last one written here.
    They are the keys' minimum|maximum, or, for the other scores, center - spread|center + spread,
    computed in fp32 and rounded to the cache's dtype: then `score` gives q·center + |q|·spread,
    an estimate that keys of the page may exceed.

    For `codes` there are no bounds. Every group whose last token is written here is coded anew,
    from the keys that the cache then holds. Per channel, in fp32 and in the order of the tokens:
    mean; mean absolute deviation d from it; step = d + d / 4, rounded to the cache's dtype;
    offset = (mean - step) - step / 2, rounded too. A code is how many of step / 2, step + step / 2
    and 2 step + step / 2 a key's distance above the offset exceeds. All devices store the same
    bits.
    The slots of one page are adjacent in `slot_mapping` and ascend, as vLLM makes them.

    Args:
        key: `[num_tokens, num_kv_heads, head_size]`, dtype of the model; last dimension contiguous.
        value: `[num_tokens, num_kv_heads, head_size]`, dtype of the model.
        kv_cache: see the module; changed in place.
        slot_mapping: `[num_slots]` int64, block * block_tokens + offset; -1 is padding.
            num_slots <= num_tokens; further tokens are padding too.
        page_size: tokens per page.
        score: `minmax`, `mean_std` (mean and population standard deviation), `mid_dev` (middle
            of minimum and maximum, and mean absolute deviation from it) or `codes`, which fp8 does
            not have.
        scales: of an fp8 cache.

    Raises:
        RuntimeError: an argument's device, dtype, layout or shape is not as above; so for every
            operator.
    """
    torch.ops.vllm_quest.write_kv(
        key, value, kv_cache, slot_mapping, page_size, score, *_both(scales)
    )


def score(query: Tensor, kv_cache: Tensor, rows: Rows, scores: Tensor, *, page_size: int) -> None:
    """Bound q·k from above for every page: the largest over the query heads that share a KV head.

    QUEST, arXiv 2406.10774, section 3.3: Σ_d max(q_d · min_d, q_d · max_d). Unscaled; of an fp8
    cache's elements as they are stored, since all pages have one scale.

    Args:
        query: `[num_rows, num_heads, head_size]`, dtype of the model.
        kv_cache: see the module.
        rows: lengths, tables and budgets.
        scores: out, `[num_rows, num_kv_heads, >= max_pages]` fp32; only the first
            ceil(seq_len / page_size) of rows over their budget are written.
        page_size: tokens per page.
    """
    torch.ops.vllm_quest.score(
        query, kv_cache, rows.block_table, rows.seq_lens, rows.budget_pages, page_size, scores
    )


def score_codes(
    query: Tensor,
    kv_cache: Tensor,
    rows: Rows,
    masses: Tensor,
    scores: Tensor,
    *,
    page_size: int,
    scale: float,
    soft_cap: float = 0.0,
) -> None:
    """Estimate which share of the attention every page holds, from the codes of its keys.

    What a page weighs is `weigh_pages`'s mass of it. A page's score is the largest, over the query
    heads that share a KV head, of its mass less the mass of all pages. Pages of a group that is not
    full get scores above all others, the higher the newer: `select` takes them before it takes any
    page for its share.

    Args:
        query: `[num_rows, num_heads, head_size]`, dtype of the model.
        kv_cache: see the module, written with the score `codes`.
        rows: lengths, tables and budgets.
        masses: scratch, `[num_rows, num_heads, >= layout.mass_columns]` fp32, whose rows begin at
            multiples of 16 bytes on a GPU; the first max_pages columns are `weigh_pages`'s.
        scores: out, `[num_rows, num_kv_heads, >= max_pages]` fp32; only the first
            ceil(seq_len / page_size) of rows over their budget are written. Page p of a group that
            is not full gets 2^102 * (2^23 + p).
        page_size: tokens per page; divides 128.
        scale: factor of q·k.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0 for none.
    """
    torch.ops.vllm_quest.score_codes(
        query,
        kv_cache,
        rows.block_table,
        rows.seq_lens,
        rows.budget_pages,
        page_size,
        scale,
        soft_cap,
        masses,
        scores,
    )


def weigh_pages(
    query: Tensor,
    kv_cache: Tensor,
    rows: Rows,
    masses: Tensor,
    *,
    page_size: int,
    scale: float,
    soft_cap: float = 0.0,
) -> None:
    """Estimate what every page weighs for every query head, from the codes of its keys, on a GPU.

    The first half of `score_codes`; `cluster_decode` does the other. A logit is
    scale * (q·offset + Σ_d q_d step_d code_d), soft-capped if need be. A page's mass is the base-2
    logarithm of Σ e^logit over its tokens. Tokens of a group that is not full have no codes, and
    their logits are exact.

    Args:
        query: `[num_rows, num_heads, head_size]`, dtype of the model.
        kv_cache: see the module, written with the score `codes`.
        rows: lengths, tables and budgets.
        masses: out, `[num_rows, num_heads, >= layout.mass_columns]` fp32, whose rows begin at
            multiples of 16 bytes. Of rows over their budget, the first ceil(seq_len / page_size)
            columns get the masses of pages, and those from max_pages, rounded up to 4, the masses
            of groups of 128 tokens.
        page_size: tokens per page; divides 128.
        scale: factor of q·k.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0 for none.
    """
    torch.ops.vllm_quest.weigh_pages(
        query,
        kv_cache,
        rows.block_table,
        rows.seq_lens,
        rows.budget_pages,
        page_size,
        scale,
        soft_cap,
        masses,
    )


def select(
    scores: Tensor,
    rows: Rows,
    pages: Tensor,
    *,
    page_size: int,
    keep_first_pages: int = 0,
    keep_newest_percent: int = 0,
) -> None:
    """Choose each KV head's pages: those that are kept, and the best-scored others, budget in all.

    Kept are the newest max(1, budget * keep_newest_percent // 100) pages, and of what is left of
    the budget up to keep_first_pages at the front. Equal scores go to the lower page number. Exact
    and deterministic.

    Args:
        scores: `[num_rows, num_kv_heads, >= max_pages]` fp32, from `score` or `score_codes`.
        rows: lengths and budgets; budgets of rows over theirs are at most max_selected.
        pages: out, `[num_rows, num_kv_heads, max_selected]` int32: page numbers, ascending, in the
            first budget entries of rows over their budget; the rest is left as it was.
        page_size: tokens per page.
        keep_first_pages: at least 0.
        keep_newest_percent: 0 to 100.
    """
    torch.ops.vllm_quest.select(
        scores,
        rows.seq_lens,
        rows.budget_pages,
        page_size,
        pages,
        keep_first_pages,
        keep_newest_percent,
    )


def sparse_decode(
    query: Tensor,
    kv_cache: Tensor,
    rows: Rows,
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
    scales: KvScales | None = None,
) -> None:
    """Attend to the selected pages, or to all of a row that fits its budget.

    Args:
        query: `[num_rows, num_heads, head_size]`, dtype of the model.
        kv_cache: see the module.
        rows: lengths, tables and budgets.
        pages: `[num_rows, num_kv_heads, max_selected]` int32, from `select`.
        out: `[num_rows, num_heads, head_size]`, dtype of the query.
        page_size: tokens per page.
        scale: factor of q·k.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0 for none.
        sinks: `[num_heads]`, dtype of the model, finite or -inf: one more logit for each query
            head, of a token whose value is 0. It is neither scaled nor capped. None: no sinks.
        workspace: from `decode_workspace`; the CPU needs none.
        counters: added to: `[5]` int64, contiguous, in the order of `counters.Counts`; None to
            count nothing.
        score: what the cache's pages are scored by: it tells a block's tokens from its other rows.
        scales: of an fp8 cache.
    """
    torch.ops.vllm_quest.sparse_decode(
        query,
        kv_cache,
        rows.block_table,
        rows.seq_lens,
        rows.budget_pages,
        pages,
        page_size,
        scale,
        soft_cap,
        out,
        workspace,
        counters,
        score,
        sinks,
        *_both(scales),
    )


def cluster_decode(
    query: Tensor,
    kv_cache: Tensor,
    rows: Rows,
    out: Tensor,
    *,
    page_size: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    workspace: Tensor | None = None,
    counters: Tensor | None = None,
    far_keys: Tensor | None = None,
    follows_write_kv: bool = False,
    keep_first_pages: int = 0,
    keep_newest_percent: int = 0,
    score: Score = "minmax",
    masses: Tensor | None = None,
    scales: KvScales | None = None,
) -> None:
    """Score, select and attend in one launch, on a GPU with clusters of CTAs.

    Arguments are those of `sparse_decode`, without the pages, and the settings of `select`. Chooses
    what `select` chooses.

    Args:
        far_keys: scratch, `[num_rows, num_kv_heads, >= max_pages]` int32, whose rows begin at
            multiples of 16 bytes; needed where the block table holds more than
            `max_cluster_pages` pages a row.
        follows_write_kv: whether nothing was launched since `write_kv` of the same layer, and the
            query was there before that. Then most of the work is done beside `write_kv`
            (csrc/cuda/DESIGN.md, "Decode begins beside the write"). It holds for rows whose pages
            are of earlier steps, but for the last GROWING_PAGES; others need the budget
            UNSETTLED_PAGES. Not with the score `codes`, since `weigh_pages` comes in between.
        masses: from `weigh_pages`, for the score `codes`, of which `score` tells; else None.

    Raises:
        RuntimeError: the GPU has no clusters, the block table holds more pages a row than
            `max_cluster_pages` allows with or without far keys, masses are missing or belong to
            another score, or what all operators refuse.
    """
    torch.ops.vllm_quest.cluster_decode(
        query,
        kv_cache,
        rows.block_table,
        rows.seq_lens,
        rows.budget_pages,
        page_size,
        scale,
        soft_cap,
        out,
        workspace,
        counters,
        far_keys,
        follows_write_kv,
        keep_first_pages,
        keep_newest_percent,
        score,
        sinks,
        masses,
        *_both(scales),
    )


def max_cluster_pages(
    group_size: int,
    head_size: int,
    device: torch.device,
    *,
    far_keys: bool = False,
    is_fp8: bool = False,
) -> int:
    """Pages a row may have in `cluster_decode` on a device, without or with far keys.

    `is_fp8`: the cache's dtype, which moves the limit a little. 0 if it does not run there.
    """
    if device.type == "cpu":
        return 0
    with torch.cuda.device(device):
        return int(torch.ops.vllm_quest.max_cluster_pages(group_size, head_size, far_keys, is_fp8))


def decode_workspace(group_size: int, head_size: int, device: torch.device) -> Tensor | None:
    """Make what `sparse_decode` and `cluster_decode` merge partial results in; None on the CPU.

    `[size]` int32, as large as the GPU and the heads need. Launches that can overlap need one each.
    Make it before a CUDA graph is captured: it must hold zeros before its first use, and does after
    every use.
    """
    if device.type == "cpu":
        return None
    with torch.cuda.device(device):
        size: int = torch.ops.vllm_quest.decode_workspace_size(group_size, head_size)
    return torch.zeros(size, dtype=torch.int32, device=device)
