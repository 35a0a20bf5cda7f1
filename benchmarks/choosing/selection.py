"""From scores to pages: what is kept before all others, and the best of the rest."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.choosing.rows import BLOCK_TOKENS, Rows


@dataclass(frozen=True)
class Keep:
    """Pages chosen before all others, within the budget; the newest page is one always."""

    first_page: bool = False
    newest_share: float = 0.0
    """Of the budget, the newest page included."""

    unfinished_block: bool = False


def chosen_pages(
    scores: Tensor,
    rows: Rows,
    *,
    page_tokens: int,
    token_budget: int,
    keep: Keep,
    held: float | None = None,
) -> Tensor:
    """The pages that each step attends to.

    Args:
        scores: `[streams, kv_heads, steps, pages]`, higher is better.
        rows: whose they are.
        page_tokens: tokens of a page.
        token_budget: tokens per KV head and step; a multiple of the page.
        keep: what comes first.
        held: a share of all pages' attention, where scores are logarithms of shares: a step takes
            no page, but for those kept, once the pages before it hold so much. None: no such end.

    Returns:
        bool, of the scores' shape.
    """
    num_pages, budget_pages = scores.shape[-1], token_budget // page_tokens
    page = torch.arange(num_pages, device=scores.device)
    newest = ((rows.lengths - 1) // page_tokens)[:, None]
    exists = page <= newest
    num_newest = max(1, int(keep.newest_share * budget_pages))
    kept = page > newest - num_newest
    if keep.first_page:
        kept = kept | (page == 0)
    if keep.unfinished_block:
        kept = kept | (page * page_tokens >= (rows.lengths // BLOCK_TOKENS * BLOCK_TOKENS)[:, None])
    num_kept = int((kept & exists).sum(-1).max())
    if num_kept > budget_pages:
        raise ValueError(
            f"a budget of {token_budget} tokens is {budget_pages} pages of {page_tokens}; "
            f"{num_kept} are kept before any is chosen"
        )
    ranked = scores.masked_fill(kept, math.inf).masked_fill(~exists, -math.inf)
    best = ranked.topk(min(budget_pages, num_pages), sorted=held is not None).indices
    is_taken = torch.ones_like(best, dtype=torch.bool)
    if held is not None:
        shares = scores.exp() * exists
        of_best = shares.gather(-1, best)
        before = of_best.cumsum(-1) - of_best
        is_taken = (before < held * shares.sum(-1, keepdim=True)) | kept.expand_as(scores).gather(
            -1, best
        )
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, is_taken) & exists
