"""What a report is to measure: settings, the cells they make, and the samples of each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import FULL, Cell
from benchmarks.accuracy.interface import quest_settings
from benchmarks.accuracy.tasks import ALL, Request
from benchmarks.accuracy.tasks.base import Filler
from benchmarks.accuracy.tokens import Language, Tokens
from vllm_quest.config import QuestConfig

SCORED_METHODS = ("quest", "quest-hf")
"""Methods that a page score belongs to."""

FULL_METHODS = ("full", "floor", "full-hf")
"""Methods that know no budget."""

SPEED_ARGS = (
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
    "tensor_parallel_size",
)
"""Engine arguments that change the time and not the answers: results may be mixed."""


@dataclass(frozen=True)
class Plan:
    """A user's choices; see `cli` for what each means."""

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    contexts: tuple[int, ...]
    dense_layers: tuple[int, ...]
    scores: tuple[str, ...]
    seeds: int
    samples: int
    language: Language
    filler: Filler = "sentences"
    text: Path | None = None
    scored_tokens: int = 256
    longbench: Path | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)

    def sample_settings(self) -> dict[str, Any]:
        """What the grades depend on beside the cell.

        Raises:
            ValueError: the engine arguments hold a bad setting of QUEST.
        """
        quest = QuestConfig.from_settings(quest_settings(self.engine_args))
        return {
            "model": self.model,
            "language": self.language,
            "seeds": self.seeds,
            "samples": self.samples,
            "filler": self.filler,
            "text": str(self.text),
            "scored_tokens": self.scored_tokens,
            "longbench": str(self.longbench),
            "engine_args": {
                key: value for key, value in self.engine_args.items() if key not in SPEED_ARGS
            },
            "kept": {
                "first_pages": quest.keep_first_pages,
                "newest_percent": quest.keep_newest_percent,
            },
        }

    def request(self, tokens: Tokens, task: str, context_tokens: int, seed: int) -> Request:
        """The samples of one seed."""
        return Request(
            tokens=tokens,
            language=self.language,
            context_tokens=context_tokens,
            num_samples=self.samples,
            seed=seed,
            first_sample=seed * self.samples,
            total_samples=self.seeds * self.samples,
            filler=self.filler,
            text_file=self.text,
            scored_tokens=self.scored_tokens,
            data_folder=self.longbench,
        )

    def cells(
        self, task: str, context_tokens: int, dense_layers: int, score: str, seed: int
    ) -> list[Cell]:
        """What one engine has to measure on one seed's samples."""
        cells = []
        for method in self.methods:
            if method not in SCORED_METHODS and score != self.scores[0]:
                continue
            budgets = self.budgets if method not in FULL_METHODS else (FULL,)
            own_score = score if method in SCORED_METHODS else ""
            cells += [
                Cell(task, context_tokens, dense_layers, method, own_score, budget, seed)
                for budget in budgets
                if budget < context_tokens
            ]
        return cells

    def all_cells(self) -> list[Cell]:
        """The whole grid, in the order of the report."""
        return [
            cell
            for task in ALL
            if task in self.tasks
            for context in self.contexts
            for dense_layers in self.dense_layers
            for score in self.scores
            for seed in range(self.seeds)
            for cell in self.cells(task, context, dense_layers, score, seed)
        ]
