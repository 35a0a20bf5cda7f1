"""Runs a plan: one engine after the other, every cell that is not finished yet."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from benchmarks.accuracy.cells import Cell, Graded, Store, result
from benchmarks.accuracy.interface import Answer, Engine, ignore, num_tokens
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.tasks import ALL, Sample
from benchmarks.accuracy.tokens import Tokens

TRANSFORMERS = "benchmarks.accuracy.transformers_methods"
VLLM_METHODS = ("full", "floor", "quest", "streaming", "oracle", "oracle-mass")


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

    def run(
        self,
        *,
        computed: Callable[[int], object] = ignore,
        finished_cells: Callable[[], object] = ignore,
    ) -> None:
        """Measure what is not in the store.

        Args:
            computed: called with tokens computed since the last call.
            finished_cells: called when cells have been added to the store.
        """
        unfinished = self.unfinished()
        finished = len(self._possible()) - len(unfinished)
        if finished:
            tqdm.write(f"{finished} cells are finished already")
        total = self.num_tokens(unfinished)
        with tqdm(total=total, unit="token", unit_scale=True) as progress:

            def count(tokens: int) -> None:
                progress.update(tokens)
                computed(tokens)

            for dense_layers in self.plan.dense_layers:
                for score in self.plan.scores:
                    for methods in (VLLM_METHODS, transformers_methods()):
                        jobs = self._jobs(dense_layers, score, methods)
                        if not jobs:
                            continue
                        progress.set_description(f"Starting, {dense_layers} dense layers")
                        with self._engine(dense_layers, score, methods) as engine:
                            for job in jobs:
                                first = job[0]
                                progress.set_description(
                                    f"{first.task} {first.context_tokens} {first.method}, "
                                    f"{dense_layers} dense"
                                )
                                self._run_job(engine, job, count)
                                finished_cells()

    def unfinished(self) -> list[Cell]:
        """The cells that can be measured and are not in the store."""
        return [cell for cell in self._possible() if cell not in self.store]

    def num_tokens(self, cells: Iterable[Cell]) -> int:
        """Tokens that answering these cells takes."""
        return sum(
            num_tokens([sample.prompt for _, sample, _ in self._requests(job)])
            for job in self._together(cells)
        )

    def reasons_unfinished(self) -> dict[str, str]:
        """What is left, as reasons for the report."""
        missing: dict[str, dict[str, None]] = {}
        for cell in self.unfinished():
            if cell.method not in self.skipped.reasons:
                where = f"{cell.task} at {cell.context_tokens} tokens, {cell.dense_layers} dense"
                name = " ".join((cell.method, cell.score)).strip()
                missing.setdefault(where, {})[name] = None
        return {
            where: f"not finished: {', '.join(names)}; the same command goes on"
            for where, names in missing.items()
        }

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

    def _together(self, cells: Iterable[Cell]) -> list[list[Cell]]:
        """Cells that differ in nothing but the budget: a request has its own."""
        jobs: dict[Cell, list[Cell]] = {}
        for cell in cells:
            jobs.setdefault(replace(cell, token_budget=0), []).append(cell)
        return list(jobs.values())

    def _jobs(self, dense_layers: int, score: str, methods: tuple[str, ...]) -> list[list[Cell]]:
        """What one engine has to measure."""
        return self._together(
            cell
            for task, context, seed in self._samples
            for cell in self.plan.cells(task, context, dense_layers, score, seed)
            if cell.method in methods and cell not in self.store
        )

    def _requests(self, job: list[Cell]) -> list[tuple[int, Sample, Cell]]:
        """What was not answered yet: samples by number, all budgets of one after the other."""
        known = {cell: self.store.under_way(cell) for cell in job}
        samples = enumerate(self._samples_of(job[0]))
        return [
            (number, sample, cell)
            for number, sample in samples
            for cell in job
            if number not in known[cell]
        ]

    def _run_job(self, engine: Engine, job: list[Cell], progress: Callable[[int], object]) -> None:
        requests = self._requests(job)
        num_samples = len(self._samples_of(job[0]))
        graded = {cell: self.store.under_way(cell) for cell in job}

        def answered(index: int, answer: Answer) -> None:
            number, sample, cell = requests[index]
            graded[cell][number] = self._grade(cell, sample, answer)
            self.store.add_answer(cell, number, graded[cell][number])
            add_if_finished(cell)

        def add_if_finished(cell: Cell) -> None:
            if len(graded[cell]) == num_samples:
                in_order = [graded[cell][number] for number in range(num_samples)]
                self.store.add(result(cell, in_order, self.machine))

        for cell in job:  # a run may have been stopped between a cell's last answer and its end
            add_if_finished(cell)
        prompts = [sample.prompt for _, sample, _ in requests]
        budgets = [cell.token_budget for _, _, cell in requests]
        try:
            engine.run(prompts, job[0].method, budgets, progress, answered)
        except NotImplementedError as error:
            self.skipped.add(job[0].method, str(error))
            progress(num_tokens(prompts))

    def _grade(self, cell: Cell, sample: Sample, answer: Answer) -> Graded:
        text = self.tokens.text(answer.tokens)
        return Graded(
            grade=ALL[cell.task].grade(sample, answer, text),
            depth=sample.depth,
            token_share=sample.token_share(answer, text),
            most_probable=sample.most_probable(answer),
            answer=text,
            target="; ".join(sample.targets),
        )

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
                options=self.plan.engine_args,
            ) as engine:
                yield engine
