"""What decode steps read, as counted on the device: proof that sparsity is on, and how much of it.

The unit of every count is one decode row (a query token) in one layer for one KV head. Counted are
the decode steps of full-attention layers, the first `dense_layers` among them, and the one-token
ends of prompts. Not counted: other prefill, sliding-window layers, padding.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_quest.config import Score

WORKER_EXTENSION = "vllm_quest.monitor.WorkerExtension"
WORKER_METHOD = "quest_counts"
"""Who answers for a worker's counters, and by which method (`monitor`)."""


@dataclass(frozen=True)
class Counts:
    """The device's counters, in their order there (`csrc/counters.h`)."""

    sparse_rows: int = 0
    """Rows that exceeded their budget, and attended to selected pages."""

    dense_rows: int = 0
    """Rows that attended in full: short ones, those of dense layers, those without a budget."""

    pages_scored: int = 0
    """Pages whose bounds or codes were read, to choose among them."""

    pages_read: int = 0
    """Pages whose keys and values were read."""

    pages_full: int = 0
    """Pages that full attention would have read in the same steps."""

    def values(self) -> list[int]:
        """The counts in order."""
        return [getattr(self, field.name) for field in fields(Counts)]


@dataclass(frozen=True)
class QuestStats(Counts):
    """Counts, and what follows from them. A page counts whole, also the newest, partly filled."""

    page_size: int = 16
    """Tokens per page."""

    score: "Score" = "minmax"
    """What pages were scored by."""

    @classmethod
    def of(cls, counts: Counts, page_size: int, score: "Score" = "minmax") -> "QuestStats":
        """Counts over pages of so many tokens."""
        return cls(**vars(counts), page_size=page_size, score=score)

    @property
    def share_of_rows_sparse(self) -> float:
        """Rows decoded sparsely among all, 0 to 1; 0 if there were none."""
        return _share(self.sparse_rows, self.sparse_rows + self.dense_rows)

    @property
    def share_of_pages_read(self) -> float:
        """Pages attended to among those of full attention, 0 to 1; 0 if there were none."""
        return _share(self.pages_read, self.pages_full)

    @property
    def share_of_kv_bytes_read(self) -> float:
        """Bytes read among those that full attention would have read, 0 or more; 0 if none.

        What pages are scored by is counted by its rows in the block (`layout`), each as large as a
        token's key and value: 1 / page_size of a page for bounds, 9 / 128 for codes. With codes,
        what else is read counts for nothing: the newest keys, which have no codes yet, and masses.
        An fp32 cache reads 5 of the 9 rows.
        """
        # Here, since every vLLM process imports this module: it stays as light as it is.
        from vllm_quest import layout

        unit_tokens, unit_rows = layout.unit(self.page_size, self.score)
        read = self.pages_read * unit_tokens + self.pages_scored * unit_rows
        return _share(read, self.pages_full * unit_tokens)


def total(counts: Iterable[Counts]) -> Counts:
    """The sum of some counts."""
    columns = zip(*(each.values() for each in counts), strict=True)
    return Counts(*map(sum, columns))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
