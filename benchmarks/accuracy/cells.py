"""The grid of a report: what is measured once is a cell; a file keeps those that are finished."""

import hashlib
import json
import os
from collections.abc import Iterable
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


class Store:
    """Finished cells, one JSON line each; another run with the same settings goes on from here.

    Several processes may add to one file at a time.
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
        self.reload()

    def reload(self) -> None:
        """Take in what others have added to the file."""
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                self._load(line)

    def _load(self, line: str) -> None:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that a run was stopped in
            return
        if row.pop("settings") == self._digest:
            cell = Cell(**{own.name: row.pop(own.name) for own in fields(Cell)})
            self._results[cell] = Result(cell, **row)

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._results

    def add(self, result: Result) -> None:
        """Keep a finished cell, in the file too."""
        self._results[result.cell] = result
        row = asdict(result)
        row = row.pop("cell") | row | {"settings": self._digest}
        with self._path.open("ab", buffering=0) as file:  # one write: lines never mix
            file.write(f"{json.dumps(row)}\n".encode())
            os.fsync(file.fileno())

    def results(self, cells: Iterable[Cell]) -> list[Result]:
        """Those of the cells that are finished for every seed: seeds differ in their depths."""
        cells = list(cells)
        unfinished = {replace(cell, seed=0) for cell in cells if cell not in self}
        return [self._results[cell] for cell in cells if replace(cell, seed=0) not in unfinished]
