"""Finished windows in a file, and the tables made from them: `report.md`, `results.json`."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.accuracy.intervals import Estimate, share_right
from benchmarks.choosing.measure import FLOOR, FULL, Outcome
from benchmarks.choosing.methods import BASELINE, METHODS

GROUP_STEPS = 32
"""Neighbouring steps are alike: the bootstrap draws groups of so many."""

RESAMPLES = 2000


class Store:
    """Finished windows, one JSON line each; a run with the same settings goes on from here."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        text = json.dumps(settings, sort_keys=True)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.windows: dict[int, list[Outcome]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that a run was stopped in
                continue
            if row["settings"] == self._digest:
                self.windows[row["window"]] = [Outcome(**own) for own in row["outcomes"]]

    def add(self, window: int, outcomes: list[Outcome]) -> None:
        """Keep a finished window, in the file too."""
        self.windows[window] = outcomes
        row = {
            "settings": self._digest,
            "window": window,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Row:
    """A method at a budget, over all windows."""

    method: str
    token_budget: int
    agreement: Estimate
    perplexity: float
    facts: Estimate | None
    tokens_attended: float | None
    """By a step of the text, KV head and sparse layer, on average; None: all."""

    agreement_difference: Estimate | None
    """To min/max of pages of 16 at the same budget, step by step."""

    facts_difference: Estimate | None
    """Likewise, question by question."""


def rows(windows: Sequence[list[Outcome]]) -> list[Row]:
    """Merge the windows."""
    merged: dict[tuple[str, int], Outcome] = {}
    attended: dict[tuple[str, int], list[float]] = {}
    for outcome in (outcome for window in windows for outcome in window):
        key = (outcome.method, outcome.token_budget)
        before = merged.get(key, Outcome(*key, [], [], []))
        if outcome.tokens_attended is not None:
            attended.setdefault(key, []).append(outcome.tokens_attended)
        merged[key] = Outcome(
            *key,
            before.agrees + outcome.agrees,
            before.nats + outcome.nats,
            before.facts_right + outcome.facts_right,
        )
    found = []
    for (method, budget), own in merged.items():
        base = merged.get((BASELINE.name, budget))
        has_difference = base is not None and method != BASELINE.name
        found.append(
            Row(
                method,
                budget,
                bootstrap(groups(own.agrees)),
                float(torch.tensor(own.nats).mean().exp()),
                share_right(own.facts_right) if own.facts_right else None,
                fmean(attended[method, budget]) if (method, budget) in attended else None,
                difference(own.agrees, base.agrees, groups) if has_difference else None,
                difference(own.facts_right, base.facts_right, list)
                if has_difference and own.facts_right
                else None,
            )
        )
    return found


def groups(steps: Sequence[float]) -> list[float]:
    """The means of neighbouring steps."""
    return [fmean(steps[i : i + GROUP_STEPS]) for i in range(0, len(steps), GROUP_STEPS)]


def difference(
    own: Sequence[int], base: Sequence[int], units: Callable[[Sequence[float]], list[float]]
) -> Estimate:
    """Of two methods on the same steps or questions."""
    return bootstrap(units([x - y for x, y in zip(own, base, strict=True)]))


def bootstrap(values: Sequence[float]) -> Estimate:
    """The mean, and the percentiles of the means of resampled values, 95 %."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = torch.tensor(values, dtype=torch.float64)[chosen].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(fmean(values), low, high)


def write(
    folder: Path, *, store: Store, command: str, machine: str, settings: dict[str, Any]
) -> None:
    """Write the tables from the windows that are finished."""
    table = rows([store.windows[number] for number in sorted(store.windows)])
    record = {
        "command": command,
        "machine": machine,
        "settings": settings,
        "windows": len(store.windows),
        "rows": [asdict(row) for row in table],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "report.md").write_text(_markdown(table, record))


def _markdown(table: Sequence[Row], record: dict[str, Any]) -> str:
    cells = {(row.method, row.token_budget): row for row in table}
    settings = record["settings"]
    full, floor = cells[FULL, 0], cells[FLOOR, 0]
    questions = f"{settings['questions'] * record['windows']} questions"
    parts = [
        "# Which choice of pages keeps a model's tokens",
        f"`{record['command']}`",
        record["machine"],
        f"{record['windows']} windows of {settings['context']} tokens, {settings['steps']} steps "
        f"each, {questions}, {settings['dense_layers']} dense layers. Intervals are 95 %: "
        f"a bootstrap's over groups of {GROUP_STEPS} steps; Wilson's for facts. Columns are token "
        "budgets per KV head. *Bytes*: what scoring reads per token and KV head, relative to "
        "bf16 minimum and maximum of pages of 16.",
        f"Full attention's perplexity is {full.perplexity:.3f}. Full attention computed another "
        f"way agrees with itself in {_share(floor.agreement)}"
        + (f"; it answers {_share(full.facts)} of the questions." if full.facts else "."),
    ]
    tables: dict[str, Callable[[Row], str]] = {
        "Agreement with full attention's most probable token, %": lambda r: _share(r.agreement),
        "Agreement, difference to min/max of pages of 16, points": lambda r: _share(
            r.agreement_difference
        ),
        "Facts answered, %": lambda r: _share(r.facts),
        "Facts, difference to min/max of pages of 16, points": lambda r: _share(r.facts_difference),
        "Perplexity": lambda r: f"{r.perplexity:.3f}",
        "Tokens attended": lambda r: f"{r.tokens_attended:.0f}" if r.tokens_attended else "",
    }
    for title, text in tables.items():
        if "Facts" not in title or full.facts:
            parts += [f"## {title}", _table(cells, text)]
    return "\n\n".join(parts) + "\n"


def _table(cells: dict[tuple[str, int], Row], text: Callable[[Row], str]) -> str:
    budgets = sorted({budget for _, budget in cells} - {0})
    lines = [["chooses by", "bytes", *map(str, budgets)], ["---"] * (2 + len(budgets))]
    for method in METHODS:
        if (method.name, budgets[0]) in cells:
            ratio = "-" if method.bytes_ratio is None else f"{method.bytes_ratio:.2g}"
            lines.append([method.name, ratio, *(text(cells[method.name, b]) for b in budgets)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    mean, low, high = (100 * value for value in asdict(estimate).values())
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"
