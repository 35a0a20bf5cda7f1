"""The plan of a batch's decodes: what the host knows, and what the operators are given."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vllm_quest.ops import UNSETTLED_PAGES, Rows


@dataclass(frozen=True)
class Decodes:
    """The decode requests at the front of a batch, as the host knows them."""

    query_lens: np.ndarray
    """[num_requests] int32: 1, or more where drafts are to be verified."""

    budget_pages: np.ndarray
    """[num_requests] int32, pages; UNLIMITED_PAGES for requests that attend in full."""

    is_unsettled: np.ndarray
    """[num_requests] bool: ends of prompts. They attend in full, and may read, by a shared prefix,
    what another request writes in the same step."""

    @property
    def one_row_each(self) -> bool:
        """Whether rows and requests coincide."""
        return bool((self.query_lens == 1).all())

    def request_of_row(self) -> np.ndarray:
        """[num_rows] int64."""
        requests = np.arange(len(self.query_lens))
        return np.asarray(np.repeat(requests, self.query_lens))

    def budget_pages_of_row(self) -> np.ndarray:
        """[num_rows] int32, pages, as the operators take them: UNSETTLED_PAGES where unsettled."""
        budget_pages = np.where(self.is_unsettled, UNSETTLED_PAGES, self.budget_pages)
        return np.repeat(budget_pages, self.query_lens).astype(np.int32)

    def tokens_after_row(self) -> np.ndarray:
        """[num_rows] int32: tokens of the row's request in this batch that it must not see."""
        ends = np.repeat(np.cumsum(self.query_lens), self.query_lens)
        tokens_after: np.ndarray = ends - 1 - np.arange(len(ends))
        return tokens_after.astype(np.int32)


@dataclass
class DecodePlan:
    """A batch's decode rows, one query token each, and the scratch of their operators."""

    rows: Rows

    unlimited: Tensor
    """[num_rows] int32, all UNLIMITED_PAGES: the budgets in dense layers."""

    any_sparse: bool
    """Whether some row may exceed its budget, so that there is something to score."""

    scores: Tensor
    """[rows_per_pass, num_kv_heads, max_pages] fp32 scratch."""

    pages: Tensor
    """[rows_per_pass, num_kv_heads, max_selected] int32 scratch."""

    workspace: Tensor | None
    """Scratch of `ops.sparse_decode` and `ops.cluster_decode`."""

    beside_write: bool = False
    """Whether decoding may begin while the step's keys are still being written: the rows' pages,
    but for the last GROWING_PAGES, are of earlier steps (csrc/cuda/DESIGN.md)."""

    in_clusters: bool = False
    """Whether the device does all stages in one launch, `ops.cluster_decode`."""

    far_keys: Tensor | None = None
    """[rows_per_pass, num_kv_heads, max_pages] int32 scratch of `ops.cluster_decode`; None where
    its shared memory has room for all keys."""

    counters: Tensor | None = None
    """[5] int64: the engine's counters, see `monitor`."""

    @property
    def dense_rows(self) -> Rows:
        """The rows in dense layers: without a budget."""
        return Rows(self.rows.block_table, self.rows.seq_lens, self.unlimited)

    def passes(self) -> list[slice]:
        """The rows, in parts that the scratch tensors hold."""
        num_rows, size = len(self.rows), len(self.scores)
        return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]

    def cluster_passes(self, *, with_scratch: bool) -> list[tuple[slice, Tensor | None]]:
        """The rows, in parts for one launch each, and the far keys that each needs.

        All rows in one part, unless far keys or, `with_scratch`, what pages weigh must hold them.
        """
        far_keys = self.far_keys
        if far_keys is None:
            parts = self.passes() if with_scratch else [slice(0, len(self.rows))]
            return [(part, None) for part in parts]
        return [(part, far_keys[: part.stop - part.start]) for part in self.passes()]
