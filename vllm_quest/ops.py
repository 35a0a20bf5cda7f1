"""Typed wrappers of the compiled operators `torch.ops.vllm_quest.*`, one per stage.

The same four operators exist for CPU and CUDA. `vllm_quest/reference.py` says in plain PyTorch
what each computes; `csrc/README.md` says how.

Dimension names, used in Python and C++ alike:

    num_rows       decode rows: one query token each, with its own page-table row and length
    num_heads      query heads; num_heads = num_kv_heads * group_size
    block_tokens   tokens of a vLLM block (N); page_size divides it
    block_rows     rows of a block: block_tokens keys|values, then block_tokens / page_size bounds
    max_pages      capacity in pages: max_blocks * block_tokens / page_size

`kv_cache` is `[num_blocks, num_kv_heads, block_rows, 2 * head_size]`, fp16, bf16 or (CPU) fp32. Row
r < block_tokens holds key|value of token r, row block_tokens + p holds minimum|maximum of the keys
of page p. (block, head) pages are contiguous; the two outer strides are free.

A row's pages are numbered by position: page j covers tokens j * page_size onwards and lies in block
`block_table[row, j * page_size // block_tokens]`. A row whose pages number no more than its budget
is attended in full: `score` and `select` skip it, and `sparse_decode` never reads its list.
A row of length 0 is padding: nothing of it is read, its output is 0.
"""

import torch
from torch import Tensor

from vllm_quest import extension
from vllm_quest.config import Score

for _device in extension.LIBRARIES:
    if extension.library(_device).exists() and (_device == "cpu" or torch.version.cuda):
        extension.load(_device)

UNLIMITED_PAGES = torch.iinfo(torch.int32).max
"""A budget that every context fits."""

UNSETTLED_PAGES = UNLIMITED_PAGES - 1
"""The same, for rows that may read pages that another request writes in this step."""

FAR_FACTOR = 32
"""How many times `max_cluster_pages` a row may have in `cluster_decode` with scores."""

GROWING_PAGES = 16
"""Pages at a row's end that its request may write in a step, see `cluster_decode`."""


def write_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    page_size: int,
    score: Score = "minmax",
) -> None:
    """Store keys and values in their slots, then recompute the bounds of every touched page.

    The bounds are taken anew over the page's filled tokens: those up to the last one written here.
    They are the keys' minimum|maximum, or, for the other scores, center - spread|center + spread,
    computed in fp32 and rounded to the cache's dtype: then `score` gives q·center + |q|·spread,
    an estimate that keys of the page may exceed.
    The slots of one page are adjacent in `slot_mapping` and ascend, as vLLM makes them.

    Args:
        key: `[num_tokens, num_kv_heads, head_size]`, dtype of the cache; last dimension contiguous.
        value: the same shape.
        kv_cache: see the module; changed in place.
        slot_mapping: `[num_slots]` int64, block * block_tokens + offset; -1 is padding.
            num_slots <= num_tokens; further tokens are padding too.
        page_size: tokens per page.
        score: `minmax`, `mean_std` (mean and population standard deviation) or `mid_dev` (middle
            of minimum and maximum, and mean absolute deviation from it).
    """
    torch.ops.vllm_quest.write_kv(key, value, kv_cache, slot_mapping, page_size, score)


def score(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    budgets: Tensor,
    page_size: int,
    scores: Tensor,
) -> None:
    """Bound q·k from above for every page: the largest over the query heads that share a KV head.

    QUEST, arXiv 2406.10774, section 3.3: Σ_d max(q_d · min_d, q_d · max_d). Unscaled.

    Args:
        query: `[num_rows, num_heads, head_size]`, dtype of the cache.
        kv_cache: see the module.
        block_table: `[num_rows, max_blocks]` int32; entries past the row's length are never read.
        seq_lens: `[num_rows]` int32, tokens, the row's own token included.
        budgets: `[num_rows]` int32, pages, at least 1.
        page_size: tokens per page.
        scores: out, `[num_rows, num_kv_heads, >= max_pages]` fp32; only the first
            ceil(seq_len / page_size) of rows over their budget are written.
    """
    torch.ops.vllm_quest.score(query, kv_cache, block_table, seq_lens, budgets, page_size, scores)


def select(
    scores: Tensor, seq_lens: Tensor, budgets: Tensor, page_size: int, pages: Tensor
) -> None:
    """Choose each KV head's pages: the newest page and the best-scored others, budget in all.

    Equal scores go to the lower page number. Exact and deterministic.

    Args:
        scores: `[num_rows, num_kv_heads, >= max_pages]` fp32, from `score`.
        seq_lens: `[num_rows]` int32, tokens.
        budgets: `[num_rows]` int32, pages; for rows over their budget at most max_selected.
        page_size: tokens per page.
        pages: out, `[num_rows, num_kv_heads, max_selected]` int32: page numbers, ascending, in the
            first budget entries of rows over their budget; the rest is left as it was.
    """
    torch.ops.vllm_quest.select(scores, seq_lens, budgets, page_size, pages)


def sparse_decode(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    budgets: Tensor,
    pages: Tensor,
    page_size: int,
    scale: float,
    soft_cap: float,
    out: Tensor,
    workspace: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """Attend to the selected pages, or to all of a row that fits its budget.

    Args:
        query: `[num_rows, num_heads, head_size]`, dtype of the cache.
        kv_cache: see the module.
        block_table: `[num_rows, max_blocks]` int32.
        seq_lens: `[num_rows]` int32, tokens.
        budgets: `[num_rows]` int32, pages.
        pages: `[num_rows, num_kv_heads, max_selected]` int32, from `select`.
        page_size: tokens per page.
        scale: factor of q·k.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap); 0 for none.
        out: `[num_rows, num_heads, head_size]`, dtype of the query.
        workspace: from `decode_workspace`; the CPU needs none.
        counters: added to: `[5]` int64, contiguous, in the order of `counters.Counts`; None to
            count nothing.
    """
    torch.ops.vllm_quest.sparse_decode(
        query,
        kv_cache,
        block_table,
        seq_lens,
        budgets,
        pages,
        page_size,
        scale,
        soft_cap,
        out,
        workspace,
        counters,
    )


def cluster_decode(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    budgets: Tensor,
    page_size: int,
    scale: float,
    soft_cap: float,
    out: Tensor,
    workspace: Tensor | None = None,
    counters: Tensor | None = None,
    scores: Tensor | None = None,
    *,
    follows_write_kv: bool = False,
) -> None:
    """Score, select and attend in one launch, on a GPU with clusters of CTAs.

    Arguments are those of `sparse_decode`, and for block tables of more than `max_cluster_pages`
    pages a row `scores`: `[num_rows, num_kv_heads, >= max_pages]` fp32 scratch, whose rows begin at
    multiples of 16 bytes. Chooses what `select` chooses.

    With `follows_write_kv`, nothing was launched since `write_kv` of the same layer, and the query
    was there before that. Then most of the work is done beside `write_kv`. It holds for rows
    whose pages are of earlier steps, but for the last GROWING_PAGES; others need the budget
    UNSETTLED_PAGES.

    Raises:
        RuntimeError: the GPU has no clusters, the table is wider than that and there are no scores,
            or it has more than FAR_FACTOR times as many pages; besides what all operators refuse.
    """
    torch.ops.vllm_quest.cluster_decode(
        query,
        kv_cache,
        block_table,
        seq_lens,
        budgets,
        page_size,
        scale,
        soft_cap,
        out,
        workspace,
        counters,
        scores,
        follows_write_kv,
    )


def max_cluster_pages(group_size: int, head_size: int, device: torch.device) -> int:
    """Pages of a row whose scores fit the shared memory of `cluster_decode` on a device.

    0 if it does not run there.
    """
    if device.type == "cpu":
        return 0
    with torch.cuda.device(device):
        return int(torch.ops.vllm_quest.max_cluster_pages(group_size, head_size))


def decode_workspace(group_size: int, head_size: int, device: torch.device) -> Tensor | None:
    """Make what `sparse_decode` needs on a device to merge its partial results; None on the CPU.

    Launches that can overlap need one each. Make it before a CUDA graph is captured: it must hold
    zeros before its first use, and does after every use.
    """
    if device.type == "cpu":
        return None
    with torch.cuda.device(device):
        size: int = torch.ops.vllm_quest.decode_workspace_size(group_size, head_size)
    return torch.zeros(size, dtype=torch.int32, device=device)
