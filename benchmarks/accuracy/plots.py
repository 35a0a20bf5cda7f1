"""The report's pictures: accuracy and perplexity against budget, accuracy over depth and length."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.accuracy.cells import FULL, Result
from benchmarks.accuracy.report import Row, method_name, rows
from benchmarks.accuracy.tasks import ALL

COLORS = {
    "full": "#777777",
    "floor": "#bbbbbb",
    "oracle": "#2a9d55",
    "oracle-mass": "#7fc97f",
    "quest": "#1f5fbf",
    "streaming": "#d1495b",
    "h2o": "#e08e1b",
    "tova": "#8a5bb5",
}
WIDE = 4
"""Perplexities that differ by this factor are drawn on a logarithmic scale."""

DEPTHS = 10
"""Rows of a heat map, at most."""


def write(folder: Path, results: Sequence[Result], scores: Sequence[str]) -> list[Path]:
    """Draw every task's pictures. Returns the files."""
    table = rows(results, scores)
    paths = []
    for task in dict.fromkeys(row.task for row in table):
        path = folder / f"{task}.png"
        _against_budget([row for row in table if row.task == task], path)
        paths.append(path)
        of_task = [result for result in results if result.cell.task == task]
        if task == "passkey" and any(depth is not None for r in of_task for depth in r.depths):
            for dense_layers in dict.fromkeys(result.cell.dense_layers for result in of_task):
                path = folder / f"{task}_depth_{dense_layers}_dense.png"
                chosen = [r for r in of_task if r.cell.dense_layers == dense_layers]
                _over_depth(chosen, scores, path)
                paths.append(path)
    return paths


def _against_budget(table: list[Row], path: Path) -> None:
    contexts = sorted({row.context_tokens for row in table})
    layers = sorted({row.dense_layers for row in table})
    is_perplexity = ALL[table[0].task].unit == "perplexity"
    scale = 1 if is_perplexity else 100
    means = [row.estimate.mean for row in table]
    is_wide = max(means) > WIDE * min(means)
    figure, axes = plt.subplots(
        len(layers),
        len(contexts),
        figsize=(1.2 + 3.6 * len(contexts), 0.9 + 2.9 * len(layers)),
        squeeze=False,
        sharey=True,
    )
    methods = list(dict.fromkeys(row.method for row in table))
    for axis, dense, context in (
        (axes[y][x], dense, context)
        for y, dense in enumerate(layers)
        for x, context in enumerate(contexts)
    ):
        here = [r for r in table if (r.context_tokens, r.dense_layers) == (context, dense)]
        axis.set_visible(bool(here))
        for method in methods:
            own = sorted((r for r in here if r.method == method), key=lambda r: r.token_budget)
            if own:
                _line(axis, method, own, scale)
        axis.set_xscale("log", base=2)
        budgets = sorted({row.token_budget for row in table} - {FULL})
        axis.set_xticks(budgets, [str(budget) for budget in budgets], fontsize=8, rotation=45)
        axis.minorticks_off()
        axis.set_title(f"{context:,} tokens, {dense} dense layers", fontsize=10)
        axis.grid(alpha=0.25)
        if not is_perplexity:
            axis.set_ylim(-3, 103)
        elif is_wide:
            axis.set_yscale("log")
    for axis in axes[-1]:
        axis.set_xlabel("token budget")
    for row_axes in axes:
        row_axes[0].set_ylabel("perplexity" if is_perplexity else "right, %")
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.suptitle(ALL[table[0].task].title, fontsize=12)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9
    )
    figure.set_layout_engine("constrained")
    _save(figure, path)


def _line(axis: Any, method: str, own: list[Row], scale: int) -> None:
    color = COLORS.get(method)
    if own[0].token_budget == FULL:
        axis.axhline(scale * own[0].estimate.mean, color=color, linestyle="--", label=method)
        return
    budgets = [row.token_budget for row in own]
    estimates = [row.estimate for row in own]
    (line,) = axis.plot(
        budgets,
        [scale * estimate.mean for estimate in estimates],
        marker="o",
        markersize=4,
        color=color,
        label=method,
        zorder=3 if method.startswith("quest") else 2,  # the oracle would hide it
    )
    axis.fill_between(
        budgets,
        [scale * estimate.low for estimate in estimates],
        [scale * estimate.high for estimate in estimates],
        color=line.get_color(),
        alpha=0.15,
        linewidth=0,
    )


def _over_depth(results: list[Result], scores: Sequence[str], path: Path) -> None:
    """One map per method and budget: lengths across, depths down, the share right as colour."""
    contexts = sorted({result.cell.context_tokens for result in results})
    grades: dict[tuple[str, int], dict[tuple[int, float], float]] = {}
    for result in results:
        cell = result.cell
        name = method_name(cell.method, cell.score, scores)
        own = grades.setdefault((name, cell.token_budget), {})
        for depth, grade in zip(result.depths, result.grades, strict=True):
            if depth is not None:
                own[cell.context_tokens, depth] = grade
    methods = list(dict.fromkeys(method for method, _ in grades))
    budgets = sorted({budget for _, budget in grades} - {FULL}) or [FULL]
    bins = min(DEPTHS, max(len(result.depths) for result in results))
    figure, axes = plt.subplots(
        len(methods),
        len(budgets),
        figsize=(1.6 + 1.5 * len(budgets), 0.8 + 1.7 * len(methods)),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    image: Any = None
    for y, method in enumerate(methods):
        for x, budget in enumerate(budgets):
            own = grades.get((method, budget), grades.get((method, FULL), {}))
            heat = [
                [
                    fmean(
                        [g for (c, d), g in own.items() if c == context and int(d * bins) == b]
                        or [float("nan")]
                    )
                    for context in contexts
                ]
                for b in range(bins)
            ]
            axis = axes[y][x]
            image = axis.imshow(heat, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_xticks(range(len(contexts)), [_short(c) for c in contexts], fontsize=7)
            axis.set_yticks([0, bins - 1], ["start", "end"], fontsize=7)
            if y == 0:
                axis.set_title(f"budget {budget}", fontsize=9)
            if x == 0:
                axis.set_ylabel(method, fontsize=9)
    figure.suptitle(
        f"Pass key: share right by length (across) and depth (down), "
        f"{results[0].cell.dense_layers} dense layers",
        fontsize=10,
    )
    figure.set_layout_engine("constrained")
    figure.colorbar(image, ax=axes, shrink=0.6)
    _save(figure, path)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens / 1000:g}k"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
