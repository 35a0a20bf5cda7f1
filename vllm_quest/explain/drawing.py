"""Draws an explanation: small multiples over layers and KV heads, pages across, decode steps down.

A page is not read (pale), read (blue, the darker the more of the true attention it holds), or
passed over although it holds much (vermilion). Blue and vermilion are from Okabe and Ito's palette,
which colour-blind people can tell apart.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vllm_quest.explain.recording import LayerRecord
from vllm_quest.explain.request import Explanation

NOT_READ = "#eef1f4"
MISSED = "#d55e00"
INK, SOFT = "#1f2328", "#57606a"
READ = LinearSegmentedColormap.from_list("read", ["#a9d3f0", "#56b4e9", "#0072b2", "#08264a"])

LEAST_MASS = 1e-4
"""The palest blue: pages read for no more than this share of the attention."""

MISSED_MASS = 0.01
"""A page not read is marked if it holds at least this share of the attention."""

DPI = 130
WIDTH_IN = 11.0
LEFT_IN, RIGHT_IN, TOP_IN, BOTTOM_IN = 1.0, 1.3, 1.2, 1.4
GAP_IN = 0.14
MAX_HEADS_APART = 4
"""More KV heads than this are averaged into one column."""

CELL_PIXELS = 2
MAX_TOKEN_LABELS = 12
"""Up to so many steps, each is labelled with the token that it took in."""


def draw(explanation: Explanation, path: Path) -> None:
    """Write the picture as a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    layers = explanation.layers
    num_steps = len(explanation.fed_tokens)
    columns = _columns(explanation.heads)
    apart = len(columns) == len(explanation.heads)
    row_in = min(max(0.14 * num_steps, 0.5), 1.4, max(13 / len(layers) - GAP_IN, 0.2))
    height_in = TOP_IN + BOTTOM_IN + len(layers) * (row_in + GAP_IN)

    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(layers),
        len(columns),
        squeeze=False,
        sharex=True,
        gridspec_kw={
            "left": LEFT_IN / WIDTH_IN,
            "right": 1 - RIGHT_IN / WIDTH_IN,
            "top": 1 - TOP_IN / height_in,
            "bottom": BOTTOM_IN / height_in,
            "hspace": GAP_IN / row_in,
            "wspace": 0.05,
        },
    )
    page_size = explanation.request.quest.page_size
    context_pages = (explanation.prompt_tokens + num_steps) / page_size
    panel_pixels = grid[0, 0].get_window_extent().width
    pages_per_cell = max(1, round(context_pages * CELL_PIXELS / panel_pixels))
    for row, (layer, record) in zip(grid, layers.items(), strict=True):
        for column, axes in enumerate(row):
            _frame(axes, explanation)
            if isinstance(record, str):
                _draw_dense(axes, record)
            else:
                shown = record.of_heads([column]) if apart else record
                _draw_pages(axes, shown, pages_per_cell, page_size)
            _mark(axes, explanation)
        _label_row(row, layer, record, explanation)
    for axes, title in zip(grid[0], columns, strict=True):
        _label_column(axes, title, page_size)
    for axes in grid[-1]:
        axes.set_xlabel("position in the context, tokens", color=SOFT, fontsize=8.5)
    _title(figure, explanation, height_in)
    _legend(figure, explanation, height_in, pages_per_cell)
    figure.savefig(path, format="png")


def _columns(heads: list[int]) -> list[str]:
    """A title for every KV head, or one for all where they are many."""
    if len(heads) <= MAX_HEADS_APART:
        return [f"KV head {head}" for head in heads]
    return [f"mean of {len(heads)} KV heads, {heads[0]} to {heads[-1]}"]


def _frame(axes: Axes, explanation: Explanation) -> None:
    num_steps = len(explanation.fed_tokens)
    axes.set_xlim(0, explanation.prompt_tokens + num_steps)
    axes.set_ylim(num_steps + 0.5, 0.5)
    axes.set_facecolor(NOT_READ)
    axes.tick_params(length=2, labelsize=7.5, colors=SOFT)
    axes.set_xticks(_positions(explanation.prompt_tokens + num_steps))
    axes.xaxis.set_major_formatter(lambda tokens, _: _in_k(int(tokens)))
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d0d7de")


def _positions(num_tokens: int) -> range:
    """Round positions, a power of two apart, four to eight of them; none at the right edge."""
    step = 1 << max(int(np.log2(num_tokens / 4)), 0)
    return range(0, num_tokens - step // 4, step)


def _in_k(number: int) -> str:
    """4096 is 4K, the way contexts are counted."""
    return f"{number / 1024:g}K" if number >= 1024 else str(number)


def _draw_dense(axes: Axes, reason: str) -> None:
    axes.set_facecolor(READ(0.0))
    axes.text(
        0.5,
        0.5,
        f"{reason}: attends " + ("in full" if reason == "dense" else "to its window"),
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=8.5,
        color=INK,
    )


def _draw_pages(axes: Axes, record: LayerRecord, pages_per_cell: int, page_size: int) -> None:
    num_steps = len(record.read)
    image = colours(record, pages_per_cell)
    axes.imshow(
        image,
        extent=(0, image.shape[1] * pages_per_cell * page_size, num_steps + 0.5, 0.5),
        aspect="auto",
        interpolation="nearest",
    )


def colours(record: LayerRecord, pages_per_cell: int) -> np.ndarray:
    """The picture's cells, `[num_steps, num_cells, 3]` RGB from 0 to 1; KV heads are averaged.

    A cell of several pages shows the strongest of them; one that was missed counts as stronger
    than any that was read.
    """
    mass = record.mass.astype(np.float32)
    weight = np.log10(np.clip(mass, LEAST_MASS, 1) / LEAST_MASS) / -np.log10(LEAST_MASS)
    strength = _strongest(np.where(record.read, 1 + weight, 0), pages_per_cell)
    per_head = np.where(strength[..., None] > 0, READ(strength - 1)[..., :3], to_rgb(NOT_READ))
    image: np.ndarray = per_head.mean(axis=1)
    missed = _strongest(np.where(record.read, 0, mass).mean(axis=1), pages_per_cell)
    image[missed >= MISSED_MASS] = to_rgb(MISSED)
    return image


def _strongest(values: np.ndarray, pages_per_cell: int) -> np.ndarray:
    """The largest value of each cell: `[..., num_pages]` becomes `[..., num_cells]`."""
    rest = -values.shape[-1] % pages_per_cell
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, rest)])
    largest: np.ndarray = padded.reshape(*values.shape[:-1], -1, pages_per_cell).max(axis=-1)
    return largest


def _mark(axes: Axes, explanation: Explanation) -> None:
    axes.axvline(explanation.prompt_tokens, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
    for first, end in explanation.places:
        axes.plot(
            (first + end) / 2,
            0,
            marker="^",
            markersize=5.5 if len(explanation.layers) <= 8 else 3.5,
            color=INK,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            zorder=5,
        )


def _label_row(
    row: np.ndarray, layer: int, record: LayerRecord | str, explanation: Explanation
) -> None:
    tokens = explanation.fed_tokens
    left, right = row[0], row[-1]
    left.annotate(
        f"layer {layer}",
        (0, 0.5),
        xytext=(-0.88 * 72, 0),
        xycoords="axes fraction",
        textcoords="offset points",
        va="center",
        fontsize=9,
        fontweight="bold",
        color=INK,
    )
    if isinstance(record, str):
        return
    height_points = left.get_window_extent().height / DPI * 72
    if len(tokens) <= MAX_TOKEN_LABELS and height_points > 7 * len(tokens):
        left.set_yticks(range(1, len(tokens) + 1), [_printable(token) for token in tokens])
    else:
        left.set_yticks([1, len(tokens)])
    lines = [f"{record.held.mean():.1%}", f"best {record.best.mean():.1%}"]
    is_low = height_points < 22
    right.annotate(
        "  ".join(lines) if is_low else "\n".join(lines),
        (1, 0.5),
        xytext=(0.09 * 72, 0),
        xycoords="axes fraction",
        textcoords="offset points",
        va="center",
        fontsize=7.5 if is_low else 8.5,
        color=INK,
        linespacing=1.3,
    )


def _printable(token: str) -> str:
    """A token as a label; signs that the font may lack are left out."""
    return re.sub(r"[^\x20-\x7e]", "", token).strip()[:8].replace("$", r"\$")


def _label_column(axes: Axes, title: str, page_size: int) -> None:
    pages = axes.secondary_xaxis(
        "top", functions=(partial(np.multiply, 1 / page_size), partial(np.multiply, page_size))
    )
    pages.set_xticks([tick / page_size for tick in axes.get_xticks()])
    pages.xaxis.set_major_formatter(lambda page, _: f"{page:.0f}")
    pages.tick_params(length=2, labelsize=7.5, colors=SOFT)
    pages.spines["top"].set_color("#d0d7de")
    pages.set_xlabel("page", color=SOFT, fontsize=8.5, labelpad=3)
    axes.annotate(
        title,
        (0, 1),
        xytext=(0, 22),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9.5,
        fontweight="bold",
        color=INK,
    )


def _title(figure: Figure, explanation: Explanation, height_in: float) -> None:
    quest = explanation.request.quest
    context = explanation.prompt_tokens + len(explanation.fed_tokens)
    pages = quest.pages(quest.token_budget)
    left = 0.1 / WIDTH_IN
    figure.text(
        left,
        1 - 0.18 / height_in,
        f"QUEST reads {pages:,} of {quest.pages(context):,} pages per KV head and decode step",
        fontsize=13.5,
        fontweight="bold",
        color=INK,
        va="top",
    )
    dense = {0: "no dense layers", 1: "one dense layer"}.get(
        quest.dense_layers, f"{quest.dense_layers} dense layers"
    )
    facts = (
        f"model {Path(explanation.request.model).name}",
        f"context {context:,} tokens",
        f"budget {quest.token_budget:,} tokens",
        f"pages of {quest.page_size} scored by {quest.score}",
        dense,
        f"rows: {len(explanation.fed_tokens)} decode steps"
        + (", by the token taken in" if len(explanation.fed_tokens) <= MAX_TOKEN_LABELS else ""),
    )
    figure.text(left, 1 - 0.47 / height_in, "  ·  ".join(facts), fontsize=9, color=SOFT, va="top")
    figure.text(
        1 - RIGHT_IN / WIDTH_IN + 0.09 / WIDTH_IN,
        1 - (TOP_IN - 0.06) / height_in,
        "true attention\nin the pages read",
        fontsize=8.5,
        fontweight="bold",
        color=INK,
        va="bottom",
    )


def _legend(
    figure: Figure, explanation: Explanation, height_in: float, pages_per_cell: int
) -> None:
    bar = figure.add_axes((LEFT_IN / WIDTH_IN, 0.56 / height_in, 2.3 / WIDTH_IN, 0.12 / height_in))
    ramp = np.geomspace(LEAST_MASS, 1, 256)[None]
    bar.pcolormesh(
        np.geomspace(LEAST_MASS, 1, 257), [0, 1], ramp, cmap=READ, norm=LogNorm(LEAST_MASS, 1)
    )
    bar.set_xscale("log")
    bar.set_xlim(LEAST_MASS, 1)
    bar.set_yticks([])
    bar.set_xticks([1e-4, 1e-2, 1], ["≤ 0.01%", "1%", "100%"])
    bar.minorticks_off()
    bar.tick_params(length=2, labelsize=7.5, colors=SOFT)
    bar.set_title(
        "page read, by its share of the true attention", fontsize=8.5, color=INK, loc="left", pad=3
    )
    for spine in bar.spines.values():
        spine.set_visible(False)

    handles: list[Patch | Line2D] = [
        Patch(facecolor=NOT_READ, edgecolor="#d0d7de", label="page not read"),
        Patch(facecolor=MISSED, label=f"not read, though it held {MISSED_MASS:.0%} or more"),
        Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (2, 2)), label="end of the prompt"),
    ]
    if explanation.places:
        answer = _printable_answer(explanation)
        handles.append(
            Line2D(
                [],
                [],
                color=INK,
                marker="^",
                markersize=5.5,
                linestyle="",
                label=f"where {answer} stands",
            )
        )
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(3.7 / WIDTH_IN, 0.3 / height_in),
        ncols=2,
        fontsize=8.5,
        frameon=False,
        labelcolor=INK,
    )
    figure.text(
        LEFT_IN / WIDTH_IN,
        0.12 / height_in,
        "True attention: the softmax over the whole context. Best: as many pages, chosen by it."
        + (
            f" A cell is {pages_per_cell} pages wide and shows the strongest of them."
            if pages_per_cell > 1
            else ""
        ),
        fontsize=8,
        color=SOFT,
    )


def _printable_answer(explanation: Explanation) -> str:
    text = explanation.request.expected or explanation.answer
    text = re.sub(r"[^\x20-\x7e]", "?", text)
    text = text if len(text) <= 40 else f"{text[:37]}..."
    return '"' + text.replace("$", r"\$") + '"'
