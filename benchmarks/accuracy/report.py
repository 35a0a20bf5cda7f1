"""The report of a plan: `report.md`, `results.json` and plots, from the finished cells."""

import json
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.accuracy.cells import FULL, Result, full_attention
from benchmarks.accuracy.intervals import Estimate, perplexity, share_right
from benchmarks.accuracy.tasks import ALL
from benchmarks.accuracy.tasks.base import Unit

TOKENS_RIGHT: dict[Unit, str] = {
    "share right": "Of the answers' tokens, those that are right in their places:",
    "perplexity": "Of the scored tokens, those that the model held for the most probable:",
}

AGREEMENT = (
    "Agreement: of the scored tokens, those in whose place the most probable token is full "
    "attention's{whose} (`floor`: full attention in batches of another size):"
)


@dataclass(frozen=True)
class Row:
    """A method at a budget, over all seeds."""

    task: str
    context_tokens: int
    dense_layers: int
    method: str
    """With its page score, where it is not the first that was asked for."""

    token_budget: int
    num_samples: int
    estimate: Estimate
    tokens_right: Estimate | None
    """The share of answer tokens, or of scored ones; None: the task has no right tokens."""

    agreement: Estimate | None = None
    """The share of scored tokens in whose place the model held the token for the most probable that
    it does under full attention; None: no tokens are scored, or full attention was not measured."""


@dataclass
class _Merged:
    """Samples of all seeds."""

    grades: list[float] = field(default_factory=list)
    token_shares: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)


def rows(
    results: Sequence[Result], scores: Sequence[str], full: Sequence[Result] | None = None
) -> list[Row]:
    """Merge the seeds of every method and budget.

    Args:
        results: finished cells.
        scores: QUEST's page scores that were asked for.
        full: another run's full attention, to agree with; None: their own.
    """
    merged: dict[tuple[str, int, int, str, int], _Merged] = {}
    own_full = [result for result in results if result.cell.method == "full"]
    most_probable = {_place(r): r.most_probable for r in (own_full if full is None else full)}
    for result in results:
        cell = result.cell
        name = method_name(cell.method, cell.score, scores)
        key = (cell.task, cell.context_tokens, cell.dense_layers, name, cell.token_budget)
        own = merged.setdefault(key, _Merged())
        own.grades += result.grades
        own.token_shares += result.token_shares
        if cell.method != "full" or full is not None:
            of_full = most_probable.get(_place(result), [])
            own.agreements += _agreements(result.most_probable, of_full)
    estimate = {"share right": share_right, "perplexity": perplexity}
    return [
        Row(
            *key,
            num_samples=len(own.grades),
            estimate=estimate[ALL[key[0]].unit](own.grades),
            tokens_right=share_right(own.token_shares) if own.token_shares else None,
            agreement=share_right(own.agreements) if own.agreements else None,
        )
        for key, own in merged.items()
    ]


def _place(result: Result) -> tuple[str, int, int, int]:
    """Where a method's samples are full attention's."""
    cell = result.cell
    return cell.task, cell.context_tokens, cell.dense_layers, cell.seed


def _agreements(own: list[list[int]], full: list[list[int]]) -> list[float]:
    """By sample, the share of places with equal tokens; none where one of the two has none."""
    if not own or not full:
        return []
    return [fmean(map(operator.eq, *pair)) for pair in zip(own, full, strict=True)]


def method_name(method: str, score: str, scores: Sequence[str]) -> str:
    """How tables and plots call a method: with its score where several were measured."""
    return f"{method} ({score})" if score and len(scores) > 1 else method


def write(
    folder: Path,
    *,
    results: Sequence[Result],
    scores: Sequence[str],
    skipped: dict[str, str],
    command: str,
    settings: dict[str, Any],
    agree_with: Path | None = None,
) -> None:
    """Write the tables; `plots` writes the pictures beside them.

    `agree_with` is the folder of the run whose full attention is agreed with; None: this one.
    """
    full = full_attention(agree_with / "cells.jsonl") if agree_with else None
    table = rows(results, scores, full)
    record = {
        "command": command,
        "machines": _machines(results),
        "settings": settings,
        "skipped": skipped,
        "rows": [asdict(row) for row in table],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "report.md").write_text(
        _markdown(table, skipped, _machines(results), command, folder, agree_with)
    )


def _machines(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.machine for result in results))


def _markdown(
    table: list[Row],
    skipped: dict[str, str],
    machines: list[str],
    command: str,
    folder: Path,
    agree_with: Path | None,
) -> str:
    whose = f", of the run in `{agree_with}`" if agree_with else ""
    parts = [
        "# What a token budget costs",
        f"`{command}`",
        "; ".join(machines),
        "Intervals are 95 %: Wilson's over answers that are right or wrong, a bootstrap's over "
        "samples for shares and perplexity.",
    ]
    for task in dict.fromkeys(row.task for row in table):
        parts.append(f"## {ALL[task].title}")
        of_task = [row for row in table if row.task == task]
        for context, dense in dict.fromkeys((r.context_tokens, r.dense_layers) for r in of_task):
            chosen = [r for r in of_task if (r.context_tokens, r.dense_layers) == (context, dense)]
            parts += _section(chosen, context, dense, whose)
        parts += [f"![{path.stem}]({path.name})" for path in sorted(folder.glob(f"{task}*.png"))]
    if skipped:
        parts.append("## Skipped")
        parts.append("\n".join(f"- {what}: {reason}" for what, reason in skipped.items()))
    return "\n\n".join(parts) + "\n"


def _section(chosen: list[Row], context: int, dense: int, whose: str) -> list[str]:
    layers = {0: "no dense layers", 1: "one dense layer"}.get(dense, f"{dense} dense layers")
    unit = ALL[chosen[0].task].unit
    parts = [f"### {context} tokens, {layers}, {chosen[0].num_samples} samples"]
    parts += _tables({(row.method, row.token_budget): row.estimate for row in chosen}, unit)
    shares = {
        (row.method, row.token_budget): row.tokens_right for row in chosen if row.tokens_right
    }
    if shares:
        parts.append(TOKENS_RIGHT[unit])
        parts += _tables(shares, "share right")
    agreements = {(row.method, row.token_budget): row.agreement for row in chosen if row.agreement}
    if agreements:
        parts.append(AGREEMENT.format(whose=whose))
        parts += _tables(agreements, "share right")
    return parts


def _tables(cells: dict[tuple[str, int], Estimate], unit: Unit) -> list[str]:
    """A line for each method without a budget, and a table of the others."""
    methods = dict.fromkeys(method for method, _ in cells)
    budgets = sorted({budget for _, budget in cells} - {FULL})
    lines = [f"{m}: {_cell(cells[m, FULL], unit)}" for m in methods if (m, FULL) in cells]
    body = [
        [method, *(_cell(cells.get((method, budget)), unit) for budget in budgets)]
        for method in methods
        if (method, FULL) not in cells
    ]
    return [*lines, *([markdown_table(["token budget", *map(str, budgets)], body)] if body else [])]


def _cell(estimate: Estimate | None, unit: Unit) -> str:
    if estimate is None:
        return ""
    mean, low, high = asdict(estimate).values()
    if unit == "perplexity":
        return f"{mean:.3f} ({low:.3f}-{high:.3f})"
    return f"{100 * mean:.1f} % ({100 * low:.0f}-{100 * high:.0f})"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
