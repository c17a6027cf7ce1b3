"""The picture of a table: ratio and fraction of the floor, by problem and direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from benchmarks.comparison import OURS, Row
from benchmarks.report import DIRECTION_NAMES

_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555"]


def save(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draws the rows that have a ratio; nothing, if none has."""
    rows = [row for row in rows if row.ratio and row.fraction]
    if not rows:
        return
    rivals = {label for row in rows for label in row.times} - {OURS}
    rival = rivals.pop() if len(rivals) == 1 else "the better PyTorch"
    problems = list(dict.fromkeys(row.problem for row in rows))
    directions = [d for d in DIRECTION_NAMES if any(row.direction == d for row in rows)]
    series = _series(rows)
    step = 0.7 / len(series)
    spread = [step * (i - (len(series) - 1) / 2) for i in range(len(series))]

    height = 1.2 + 2 * (0.9 + len(problems) * max(0.26, 0.17 * len(series)))
    figure, grid = plt.subplots(
        2,
        len(directions),
        figsize=(2.2 + 4.2 * len(directions), height),
        sharey=True,
        sharex="row",
        squeeze=False,
        layout="constrained",
    )
    for column, direction in enumerate(directions):
        top, bottom = grid[:, column]
        for i, (label, members) in enumerate(series.items()):
            here = [row for row in members if row.direction == direction]
            places = [problems.index(row.problem) + spread[i] for row in here]
            style = {"color": _COLOURS[i % len(_COLOURS)], "label": label}
            _stems(top, places, [row.ratio or 0 for row in here], 1.0, _times, style)
            _stems(bottom, places, [row.fraction or 0 for row in here], 0.0, "{:.0%}".format, style)
        top.set_title(DIRECTION_NAMES[direction], fontweight="bold")
        top.set_xscale("log")
        top.axvline(1.0, color="black", linewidth=1)
        top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _times(value)))
        top.xaxis.set_minor_formatter(NullFormatter())
        top.set_xlabel(f"times as fast as {rival}")
        bottom.axvline(1.0, color="black", linewidth=1)
        bottom.xaxis.set_major_formatter(PercentFormatter(1.0))
        bottom.set_xlabel("part of the machine's measured ceiling")
        for axes in (top, bottom):
            axes.set_yticks(range(len(problems)), problems)
            axes.set_ylim(len(problems) - 0.5, -0.5)
            axes.grid(axis="x", color="#dddddd")
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            for between in range(1, len(problems)):
                axes.axhline(between - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    ratios = [row.ratio for row in rows if row.ratio]
    low, high = min(0.5, *ratios), max(2.0, *ratios)
    # Room for the numbers at the ends of the stems.
    room = (high / low) ** 0.15
    grid[0, 0].set_xlim(low / room, high * room)
    wide = high / low > 100
    grid[0, 0].xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    grid[1, 0].set_xlim(0, max(1.1, 1.15 * max(row.fraction or 0 for row in rows)))
    figure.suptitle(title)
    if len(series) > 1:
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=min(6, len(series)),
            frameon=False,
        )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by what tells their colours apart: only what differs among them is in the label."""
    keys = [(row.precision, row.layout, row.algorithm) for row in rows]
    differing = [i for i in range(3) if len({key[i] for key in keys}) > 1] or [0]
    series: dict[str, list[Row]] = {}
    for row, key in zip(rows, keys, strict=True):
        series.setdefault(", ".join(key[i] for i in differing), []).append(row)
    return series


def _times(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.3g}x" if value >= 1 else f"{value:.2g}x"


def _stems(
    axes: Axes,
    places: list[float],
    values: list[float],
    base: float,
    text: Callable[[float], str],
    style: dict[str, str],
) -> None:
    """Dots with their values, tied to `base` by a line."""
    axes.hlines(places, base, values, color=style["color"], linewidth=2)
    axes.plot(values, places, "o", markersize=5, **style)
    for place, value in zip(places, values, strict=True):
        side = 1 if value >= base else -1
        axes.annotate(
            text(value),
            (value, place),
            xytext=(6 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=7,
            color=style["color"],
        )
