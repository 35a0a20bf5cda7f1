"""The grid of a report: what is measured once is a cell; a file keeps those that are finished."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

FULL = -1
"""The token budget of full attention."""


@dataclass(frozen=True, order=True)
class Cell:
    """One seed's samples of a task under one method and budget."""

    task: str
    context_tokens: int
    dense_layers: int
    method: str
    score: str
    """QUEST's page score; other methods have none, and an empty one."""

    token_budget: int
    """Tokens per KV head and decode step; -1: all."""

    seed: int


@dataclass(frozen=True)
class Result:
    """The grades of a cell's samples, in order."""

    cell: Cell
    grades: list[float]
    depths: list[float | None]
    machine: str
    """What it was measured on, and with which versions."""

    token_shares: list[float] = field(default_factory=list)
    """Of each sample, the share of tokens that are right; empty: the task has no such tokens."""

    most_probable: list[list[int]] = field(default_factory=list)
    """Of each sample, the token that the model held for the most probable in each scored token's
    place; empty: the task scores none."""

    answers: list[str] = field(default_factory=list)
    """Of each sample, the free answer's text."""

    targets: list[str] = field(default_factory=list)
    """Of each sample, what a right answer holds."""


@dataclass(frozen=True)
class Graded:
    """One sample's answer in a cell."""

    grade: float
    depth: float | None
    token_share: float | None
    most_probable: list[int]
    answer: str
    target: str


def result(cell: Cell, graded: Iterable[Graded], machine: str) -> Result:
    """A cell whose samples are all answered, in order."""
    graded = list(graded)
    return Result(
        cell,
        [own.grade for own in graded],
        [own.depth for own in graded],
        machine,
        token_shares=[own.token_share for own in graded if own.token_share is not None],
        most_probable=[own.most_probable for own in graded if own.most_probable],
        answers=[own.answer for own in graded],
        targets=[own.target for own in graded],
    )


def _stored(path: Path) -> Iterator[tuple[str, Cell, dict[str, Any]]]:
    """A file's rows: the digest of their settings, the cell, and the rest."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that a run was stopped in
            continue
        digest = row.pop("settings")
        yield digest, Cell(**{own.name: row.pop(own.name) for own in fields(Cell)}), row


def full_attention(path: Path) -> list[Result]:
    """Full attention's cells in a file of finished cells, whatever the settings of its run."""
    return [Result(cell, **row) for _, cell, row in _stored(path) if cell.method == "full"]


class Store:
    """Finished cells, one JSON line each; another run with the same settings goes on from here.

    A second file has the answers of cells under way: a run that is killed loses none. Several
    processes may add to the files at a time.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Open it.

        Args:
            path: the file; made if missing.
            settings: what else the numbers depend on; results of other settings are not mixed in.
        """
        self._path = path
        self._digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[
            :16
        ]
        self._results: dict[Cell, Result] = {}
        self._under_way_path = path.with_name("under_way.jsonl")
        self._under_way: dict[Cell, dict[int, Graded]] = {}
        self.reload()
        for cell, row in self._rows(self._under_way_path):
            sample = row.pop("sample")
            self._under_way.setdefault(cell, {})[sample] = Graded(**row)

    def reload(self) -> None:
        """Take in what others have added to the file."""
        for cell, row in self._rows(self._path):
            self._results[cell] = Result(cell, **row)

    def _rows(self, path: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """The rows of these settings, each without its cell."""
        return ((cell, row) for digest, cell, row in _stored(path) if digest == self._digest)

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._results

    def add(self, result: Result) -> None:
        """Keep a finished cell, in the file too."""
        self._results[result.cell] = result
        row = asdict(result)
        self._append(self._path, row.pop("cell") | row)

    def under_way(self, cell: Cell) -> dict[int, Graded]:
        """Answers of a cell by sample, of a run that was stopped before the cell was finished."""
        return dict(self._under_way.get(cell, {}))

    def add_answer(self, cell: Cell, sample: int, graded: Graded) -> None:
        """Keep an answer of a cell under way, in the file alone."""
        self._append(self._under_way_path, asdict(cell) | {"sample": sample} | asdict(graded))

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        line = json.dumps(row | {"settings": self._digest})
        with path.open("ab", buffering=0) as file:  # one write: lines never mix
            file.write(f"{line}\n".encode())
            os.fsync(file.fileno())

    def results(self, cells: Iterable[Cell]) -> list[Result]:
        """Those of the cells that are finished for every seed: seeds differ in their depths."""
        cells = list(cells)
        unfinished = {replace(cell, seed=0) for cell in cells if cell not in self}
        return [self._results[cell] for cell in cells if replace(cell, seed=0) not in unfinished]
