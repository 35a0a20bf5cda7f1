"""Other choices of pages, to compare QUEST's with: same budget, same kernels, same dense layers.

They take the place of `impl.choose_by_score` within the harness; no user setting leads here.

`streaming`    the first page and the most recent ones (StreamingLLM, arXiv 2309.17453; tokens keep
               their positions in the text, which StreamingLLM renumbers).
`oracle`       the pages with the largest true q·k: of a page, the maximum over its tokens and over
               the query heads that share the KV head. QUEST's score is an upper bound of it.
`oracle-mass`  the pages with the largest true attention mass: of a page, its share of a query
               head's softmax over the whole context, the maximum over the query heads that share
               the KV head.

All choose per KV head and keep, within the budget, what QUEST's settings keep: by default the first
and the newest page.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionLayer

from vllm_quest import kv_page, ops
from vllm_quest.impl import Chooser, QuestImpl, choose_by_score

GATHERED_BYTES = 1 << 28
"""Room for the keys that an oracle looks at in one go."""

PageScores = Callable[[QuestImpl, Tensor, Tensor, ops.Rows, Tensor], None]
"""(impl, query, kv_cache, rows, scores): fills scores; arguments as in `ops`."""


def _chooser(score_pages: PageScores) -> Chooser:
    """What `QuestImpl.choosing` takes, from scores of pages: the one place that knows its call."""

    def choose(
        impl: QuestImpl,
        layer: AttentionLayer,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        scores: Tensor,
        pages: Tensor,
    ) -> None:
        if impl.has_fp8_cache:
            query = query.float() * layer._k_scale  # the oracles' logits are of scaled keys
        score_pages(impl, query, kv_cache, rows, scores)
        ops.select(scores, rows, pages, page_size=impl.quest.page_size, **impl.quest.kept)

    return choose


def score_by_age(
    impl: QuestImpl, query: Tensor, kv_cache: Tensor, rows: ops.Rows, scores: Tensor
) -> None:
    """Score pages by their number, the first best of all."""
    scores.copy_(torch.arange(scores.shape[-1], device=scores.device).expand_as(scores))
    scores[..., 0] = math.inf


def score_by_maximum(
    impl: QuestImpl, query: Tensor, kv_cache: Tensor, rows: ops.Rows, scores: Tensor
) -> None:
    """Score pages by their largest logit."""
    for part, logits in _true_logits(impl, query, kv_cache, rows):
        per_page = logits.amax(dim=(2, -1))
        scores[part, :, : per_page.shape[-1]] = per_page


def score_by_mass(
    impl: QuestImpl, query: Tensor, kv_cache: Tensor, rows: ops.Rows, scores: Tensor
) -> None:
    """Score pages by the logarithm of their largest share of a query head's attention."""
    for part, logits in _true_logits(impl, query, kv_cache, rows):
        of_page = logits.logsumexp(dim=-1)
        per_page = (of_page - of_page.logsumexp(dim=-1, keepdim=True)).amax(dim=2)
        scores[part, :, : per_page.shape[-1]] = per_page


def _true_logits(
    impl: QuestImpl, query: Tensor, kv_cache: Tensor, rows: ops.Rows
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and `[rows, kv_heads, group, pages, page_size]` fp32 of them.

    Slots past a row's end have -inf: they hold anything, those of its newest page included.
    """
    num_rows, _, head_size = query.shape
    num_kv_heads, page_size = kv_cache.shape[1], impl.quest.page_size
    block_tokens = kv_page.block_tokens(kv_cache, page_size, impl.quest.score)
    num_blocks = -(-int(rows.seq_lens.max()) // block_tokens)
    row_bytes = num_blocks * block_tokens * num_kv_heads * head_size * 4
    rows_at_once = max(1, GATHERED_BYTES // row_bytes)
    by_head = kv_cache[:, :, :block_tokens, :head_size].transpose(0, 1)
    token = torch.arange(num_blocks * block_tokens, device=query.device)
    for first in range(0, num_rows, rows_at_once):
        part = slice(first, min(first + rows_at_once, num_rows))
        # [num_kv_heads, rows, num_blocks * block_tokens, head_size]
        keys = by_head[:, rows.block_table[part, :num_blocks].long()].float().flatten(2, 3)
        # [num_kv_heads, rows, group_size, head_size]
        grouped = query[part].float().unflatten(1, (num_kv_heads, -1)).transpose(0, 1)
        logits = torch.matmul(grouped, keys.mT).transpose(0, 1) * impl.scale
        if impl.soft_cap:
            logits = impl.soft_cap * torch.tanh(logits / impl.soft_cap)
        logits.masked_fill_(token >= rows.seq_lens[part, None, None, None], -math.inf)
        yield part, logits.unflatten(-1, (-1, page_size))


choose_streaming = _chooser(score_by_age)
choose_oracle = _chooser(score_by_maximum)
choose_oracle_mass = _chooser(score_by_mass)

CHOICES: dict[str, Chooser] = {
    "full": choose_by_score,  # with a budget that covers everything
    "floor": choose_by_score,  # likewise, in batches of another size
    "quest": choose_by_score,
    "streaming": choose_streaming,
    "oracle": choose_oracle,
    "oracle-mass": choose_oracle_mass,
}


def choosing(method: str) -> AbstractContextManager[None]:
    """Let a method choose the pages of every QUEST layer of this process."""
    return QuestImpl.choosing(CHOICES[method])
