"""Decode steps that first compare the bounds they are about to read with the keys beside them.

Bounds that a connector lost, or brought with other keys, do not stop a request: they only make it
choose other pages. So each page of each sparse row is checked, in every layer and step, on the
cache of a running engine. CUDA graphs would not see it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_quest import ops, reference
from vllm_quest.impl import QuestImpl, choose_by_score
from vllm_quest.monitor import WorkerExtension


@dataclass
class Checked:
    """How many pages had the bounds of their keys; another one ends the engine's step."""

    pages: int = 0

    def chooser(
        self,
        impl: QuestImpl,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        rows: ops.Rows,
        scores: Tensor,
        pages: Tensor,
    ) -> None:
        """QUEST's own choice, behind the check."""
        for row, seq_len in enumerate(rows.seq_lens.tolist()):
            self.pages += check_row(kv_cache, rows.block_table[row], seq_len, impl.quest.page_size)
        choose_by_score(impl, layer, query, kv_cache, rows, scores, pages)


def check_row(kv_cache: Tensor, block_table: Tensor, seq_len: int, page_size: int) -> int:
    """Assert that each page of a row has the minimum and maximum of its keys; return how many."""
    block_tokens = reference.tokens_per_block(kv_cache, page_size)
    blocks = block_table[: -(-seq_len // block_tokens)].long()
    cache = kv_cache[blocks].cpu()  # [num_blocks, num_kv_heads, block_rows, 2 * head_size]
    keys = cache[:, :, :block_tokens, : cache.shape[3] // 2]
    keys = keys.transpose(1, 2).flatten(0, 1)[:seq_len]  # [seq_len, num_kv_heads, head_size]
    bounds = cache[:, :, block_tokens:].transpose(1, 2).flatten(0, 1)
    pages = keys.split(page_size)
    for page, (page_keys, page_bounds) in enumerate(zip(pages, bounds, strict=False)):
        low_high = torch.cat([page_keys.amin(0), page_keys.amax(0)], -1)
        assert torch.equal(page_bounds, low_high), (
            f"page {page} of {len(pages)} has not the bounds of its keys"
        )
    return len(pages)


@contextlib.contextmanager
def check_bounds() -> Iterator[Checked]:
    """Check the engines of this process."""
    checked = Checked()
    with QuestImpl.choosing(checked.chooser):
        yield checked


class Extension(WorkerExtension):
    """The same for engines whose workers are processes of their own (`--worker-extension-cls`)."""

    def check_bounds(self) -> None:
        """Check every step from now on."""
        self.checked_bounds = Checked()
        QuestImpl.chooser = self.checked_bounds.chooser

    def checked_pages(self) -> int:
        """How many pages were checked."""
        return self.checked_bounds.pages
