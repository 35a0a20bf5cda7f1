"""Other choices of pages, to compare QUEST's with: same budget, same kernels, same dense layers.

They take the place of `QuestImpl.choose_pages` within the harness; no user setting leads here.

`streaming`  the first page and the most recent ones (StreamingLLM, arXiv 2309.17453; tokens keep
             their positions in the text, which StreamingLLM renumbers).
`oracle`     the pages with the largest true q·k: of a page, the maximum over its tokens and over
             the query heads that share the KV head. Per KV head, as QUEST, whose score is an upper
             bound of the same number.

Both keep the newest page, as QUEST does, and count it in the budget.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionLayer

from vllm_quest import kv_page, ops
from vllm_quest.impl import QuestImpl

GATHERED_BYTES = 1 << 28
"""Room for the keys that the oracle looks at in one go."""


def choose_streaming(
    impl: QuestImpl,
    layer: AttentionLayer,
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    budgets: Tensor,
    scores: Tensor,
    pages: Tensor,
) -> None:
    """Score pages by their number, the first best of all; arguments as in `ops`."""
    scores.copy_(torch.arange(scores.shape[-1], device=scores.device).expand_as(scores))
    scores[..., 0] = math.inf
    ops.select(scores, seq_lens, budgets, impl.quest.page_size, pages)


def choose_oracle(
    impl: QuestImpl,
    layer: AttentionLayer,
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    budgets: Tensor,
    scores: Tensor,
    pages: Tensor,
) -> None:
    """Score pages by their largest q·k; arguments as in `ops`."""
    num_rows, num_heads, head_size = query.shape
    num_kv_heads, page_size = kv_cache.shape[1], impl.quest.page_size
    group_size = num_heads // num_kv_heads
    block_tokens = kv_page.block_tokens(kv_cache, page_size, impl.quest.score)
    num_blocks = -(-int(seq_lens.max()) // block_tokens)
    row_bytes = num_blocks * block_tokens * num_kv_heads * head_size * 4
    rows_at_once = max(1, GATHERED_BYTES // row_bytes)
    by_head = kv_cache[:, :, :block_tokens, :head_size].transpose(0, 1)
    token = torch.arange(num_blocks * block_tokens, device=query.device)
    for first in range(0, num_rows, rows_at_once):
        rows = slice(first, min(first + rows_at_once, num_rows))
        # [num_kv_heads, rows, num_blocks * block_tokens, head_size]
        keys = by_head[:, block_table[rows, :num_blocks].long()].float().flatten(2, 3)
        # [num_kv_heads, rows, head_size, group_size]
        grouped = query[rows].float().reshape(-1, num_kv_heads, group_size, head_size)
        grouped = grouped.permute(1, 0, 3, 2)
        dots = torch.matmul(keys, grouped).amax(dim=-1).transpose(0, 1)
        # Slots past a row's end hold anything, its newest page's included.
        dots.masked_fill_(token >= seq_lens[rows, None, None], -math.inf)
        per_page = dots.view(*dots.shape[:2], -1, page_size).amax(dim=-1)
        scores[rows, :, : per_page.shape[-1]] = per_page
    ops.select(scores, seq_lens, budgets, page_size, pages)


CHOICES: dict[str, Any] = {
    "full": QuestImpl.choose_pages,  # with a budget that covers everything
    "quest": QuestImpl.choose_pages,
    "streaming": choose_streaming,
    "oracle": choose_oracle,
}


def choosing(method: str) -> AbstractContextManager[None]:
    """Let a method choose the pages of every QUEST layer of this process."""
    return QuestImpl.choosing(CHOICES[method])
