"""Runs a plan: one engine after the other, every cell that is not finished yet."""

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy.cells import Cell, Result, Store
from benchmarks.accuracy.interface import Engine
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.tasks import ALL, Sample
from benchmarks.accuracy.tokens import Tokens

TRANSFORMERS = "benchmarks.accuracy.transformers_methods"
VLLM_METHODS = ("full", "quest", "streaming", "oracle")


@dataclass
class Skipped:
    """What was not measured, and why; each reason once."""

    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, reason: str) -> None:
        if what not in self.reasons:
            tqdm.write(f"Skipped: {what}: {reason}")
            self.reasons[what] = reason


def transformers_methods() -> tuple[str, ...]:
    """Methods that run in plain PyTorch over transformers, where they are installed."""
    if importlib.util.find_spec(TRANSFORMERS) is None:
        return ()
    return tuple(importlib.import_module(TRANSFORMERS).METHODS)


class Measurement:
    """A plan under way."""

    def __init__(self, plan: Plan, store: Store, tokens: Tokens, machine: str) -> None:
        self.plan = plan
        self.store = store
        self.tokens = tokens
        self.machine = machine
        self.skipped = Skipped()
        self._samples: dict[tuple[str, int, int], list[Sample]] = {}

    def run(self) -> None:
        """Measure what is not in the store."""
        unfinished = self.unfinished()
        finished = len(self._possible()) - len(unfinished)
        if finished:
            tqdm.write(f"{finished} cells are finished already")
        with tqdm(total=self.num_answers(unfinished), unit="answer") as progress:
            for dense_layers in self.plan.dense_layers:
                for score in self.plan.scores:
                    for methods in (VLLM_METHODS, transformers_methods()):
                        self._run_engine(dense_layers, score, methods, progress)

    def unfinished(self) -> list[Cell]:
        """The cells that can be measured and are not in the store."""
        return [cell for cell in self._possible() if cell not in self.store]

    def num_answers(self, cells: Iterable[Cell]) -> int:
        """How many answers these cells hold together."""
        return sum(len(self._samples_of(cell)) for cell in cells)

    def name_unfinished(self) -> None:
        """Name what is left among the skipped."""
        missing: dict[str, dict[str, None]] = {}
        for cell in self.unfinished():
            if cell.method not in self.skipped.reasons:
                where = f"{cell.task} at {cell.context_tokens} tokens, {cell.dense_layers} dense"
                name = " ".join((cell.method, cell.score)).strip()
                missing.setdefault(where, {})[name] = None
        for where, names in missing.items():
            self.skipped.add(where, f"not finished: {', '.join(names)}; the same command goes on")

    def make_samples(self) -> None:
        """Before anything else: what is asked, and what cannot be."""
        groups = [
            (task, context, seed)
            for task in self.plan.tasks
            for context in self.plan.contexts
            for seed in range(self.plan.seeds)
        ]
        for group in tqdm(groups, desc="Making samples", leave=False):
            task, context, seed = group
            request = self.plan.request(self.tokens, task, context, seed)
            refusal = ALL[task].refusal(request)
            if refusal is None:
                try:
                    self._samples[group] = ALL[task].samples(request)
                except ValueError as error:
                    refusal = str(error)
            if refusal is not None:
                self.skipped.add(f"{task} at {context} tokens", refusal)

    def _samples_of(self, cell: Cell) -> list[Sample]:
        return self._samples[cell.task, cell.context_tokens, cell.seed]

    def _possible(self) -> list[Cell]:
        return [
            cell
            for cell in self.plan.all_cells()
            if (cell.task, cell.context_tokens, cell.seed) in self._samples
        ]

    def _run_engine(
        self, dense_layers: int, score: str, methods: tuple[str, ...], progress: "tqdm[Any]"
    ) -> None:
        jobs: dict[tuple[str, int, int, str], list[Cell]] = {}
        for (task, context, seed), _ in self._samples.items():
            for cell in self.plan.cells(task, context, dense_layers, score, seed):
                if cell.method in methods and cell not in self.store:
                    jobs.setdefault((task, context, seed, cell.method), []).append(cell)
        if not jobs:
            return
        progress.set_description(f"Starting, {dense_layers} dense layers")
        with self._engine(dense_layers, score, methods) as engine:
            for (task, context, _, method), cells in jobs.items():
                progress.set_description(f"{task} {context} {method}, {dense_layers} dense")
                try:
                    self._run_cells(engine, cells, progress)
                except NotImplementedError as error:
                    self.skipped.add(method, str(error))
                    progress.update(len(cells) * len(self._samples_of(cells[0])))

    def _run_cells(self, engine: Engine, cells: list[Cell], progress: "tqdm[Any]") -> None:
        """All budgets of one method at once: a request has its own."""
        task, samples = ALL[cells[0].task], self._samples_of(cells[0])
        requests = [(sample, cell) for sample in samples for cell in cells]
        answers = engine.run(
            [sample.prompt for sample, _ in requests],
            cells[0].method,
            [cell.token_budget for _, cell in requests],
            progress.update,
        )
        depths = [sample.depth for sample in samples]
        results = {cell: Result(cell, [], depths, self.machine) for cell in cells}
        for (sample, cell), answer in zip(requests, answers, strict=True):
            text = self.tokens.text(answer.tokens)
            results[cell].grades.append(task.grade(sample, answer, text))
            share = sample.token_share(answer, text)
            if share is not None:
                results[cell].token_shares.append(share)
        for result in results.values():
            self.store.add(result)

    @contextmanager
    def _engine(self, dense_layers: int, score: str, methods: tuple[str, ...]) -> Iterator[Engine]:
        longest = max(s.prompt.num_tokens for group in self._samples.values() for s in group)
        if methods == VLLM_METHODS:
            from benchmarks.accuracy.vllm_engine import VllmEngine

            with VllmEngine(
                self.plan.model,
                dense_layers=dense_layers,
                score=score,
                max_model_len=longest + 1,
                options=self.plan.engine_args,
            ) as engine:
                yield engine
        else:
            module = importlib.import_module(TRANSFORMERS)
            with module.TransformersEngine(
                self.plan.model,
                dense_layers=dense_layers,
                score=score,
                max_model_len=longest + 1,
            ) as engine:
                yield engine
