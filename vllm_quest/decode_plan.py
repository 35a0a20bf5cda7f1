"""Decode rows: what the operators need to know of a batch's decodes."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Decodes:
    """The decode requests at the front of a batch, as the host knows them."""

    query_lens: np.ndarray
    """[num_requests] int32: 1, or more where drafts are to be verified."""

    budgets: np.ndarray
    """[num_requests] int32, pages; UNLIMITED_PAGES or UNSETTLED_PAGES for dense requests."""

    @property
    def one_row_each(self) -> bool:
        """Whether rows and requests coincide."""
        return bool((self.query_lens == 1).all())

    def request_of_row(self) -> np.ndarray:
        """[num_rows] int64."""
        requests = np.arange(len(self.query_lens))
        return np.asarray(np.repeat(requests, self.query_lens))

    def tokens_after_row(self) -> np.ndarray:
        """[num_rows] int32: tokens of the row's request in this batch that it must not see."""
        ends = np.repeat(np.cumsum(self.query_lens), self.query_lens)
        tokens_after: np.ndarray = ends - 1 - np.arange(len(ends))
        return tokens_after.astype(np.int32)


@dataclass
class DecodeRows:
    """One query token each, first in the batch; see `ops` for what the tensors mean."""

    seq_lens: Tensor
    """[num_rows] int32, tokens up to and including the row's own; 0 in padding."""

    block_table: Tensor
    """[num_rows, max_blocks] int32."""

    budgets: Tensor
    """[num_rows] int32, pages."""

    unlimited: Tensor
    """[num_rows] int32, all UNLIMITED_PAGES: the budgets in dense layers."""

    any_sparse: bool
    """Whether some row may exceed its budget, so that there is something to score."""

    scores: Tensor
    """[rows_per_pass, num_kv_heads, max_pages] fp32 scratch."""

    pages: Tensor
    """[rows_per_pass, num_kv_heads, max_selected] int32 scratch."""

    workspace: Tensor | None
    """Scratch of `ops.sparse_decode`."""

    in_clusters: bool = False
    """Whether the device does all stages in one launch, `ops.cluster_decode`."""

    clusters_need_scores: bool = False
    """Whether that needs `scores`: for rows of more pages than its shared memory has room for."""

    counters: Tensor | None = None
    """[5] int64: the engine's counters, see `monitor`."""

    def passes(self) -> list[slice]:
        """The rows, in parts that the scratch tensors hold."""
        num_rows, size = len(self.seq_lens), len(self.scores)
        return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]

    def cluster_passes(self) -> list[tuple[slice, Tensor | None]]:
        """The rows, in parts for one launch each, and the scores that it needs."""
        if not self.clusters_need_scores:
            return [(slice(0, len(self.seq_lens)), None)]
        return [(part, self.scores[: part.stop - part.start]) for part in self.passes()]
