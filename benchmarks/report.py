"""What is shown and kept: the table on the screen, JSON, Markdown."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.comparison import OK, OURS, REFUSED, Row
from benchmarks.contestants import PYTORCH_DEFAULT

DIRECTION_NAMES = {
    "forward": "forward",
    "backward_input": "backward-input",
    "backward_weight": "backward-weight",
}

Column = tuple[str, Callable[[Row], str]]


def console() -> Console:
    """A console that does not fold the table where there is no terminal to fit."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=240)


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _milliseconds(row: Row, label: str) -> str:
    return _number(row.times[label]["median_ms"], ".4g") if label in row.times else ""


def _rate(row: Row) -> str:
    if OURS not in row.times:
        return ""
    median = row.times[OURS]["median_ms"]
    if row.memory_bound:
        return f"{row.megabytes / median:.3g} GB/s"
    return f"{row.gflop / median:.3g} TFLOP/s"


def _algorithm(row: Row) -> str:
    return f"plan: {row.chosen}" if row.algorithm == "plan" and row.chosen else row.algorithm


def _workspace(row: Row) -> str:
    used = row.workspace.get(OURS)
    return "" if used is None else f"{used / 2**20:.1f}"


def _status(row: Row) -> str:
    return "" if row.status == OK and not row.note else f"{row.status}: {row.note}".rstrip(": ")


def columns(rows: Sequence[Row]) -> list[Column]:
    """The table's columns: heading and cell; those that would be empty throughout are left out."""
    rivals = [label for label in dict.fromkeys(k for r in rows for k in r.times) if label != OURS]
    reference = PYTORCH_DEFAULT if PYTORCH_DEFAULT in rivals else next(iter(rivals), "")
    every: list[Column] = [
        ("problem", lambda r: r.problem),
        ("direction", lambda r: DIRECTION_NAMES[r.direction]),
        ("precision", lambda r: r.precision),
        ("layout", lambda r: r.layout),
        ("algorithm", _algorithm),
        ("conv_ops ms", lambda r: _milliseconds(r, OURS)),
        *((f"{rival} ms", lambda r, rival=rival: _milliseconds(r, rival)) for rival in rivals),
        ("ratio", lambda r: _number(r.ratio, ".2f")),
        ("rate", _rate),
        ("of floor", lambda r: _number(r.fraction, ".0%")),
        ("of 3xTF32 floor", lambda r: _number(r.fraction_3xtf32, ".0%")),
        ("error", lambda r: _number(r.errors.get(OURS), ".1e")),
        (f"{reference} error", lambda r: _number(r.errors.get(reference), ".1e")),
        ("workspace MiB", _workspace),
        ("", _status),
    ]
    return [(heading, cell) for heading, cell in every if any(map(cell, rows))]


def line(row: Row) -> str:
    """A row in one line, for the log of a run."""
    parts = [row.problem, DIRECTION_NAMES[row.direction], row.precision, row.layout]
    parts.append(_algorithm(row))
    parts += [f"{label} {t['median_ms']:.4g} ms" for label, t in row.times.items()]
    parts += [f"ratio {row.ratio:.2f}"] if row.ratio else []
    parts += [f"error {row.errors[OURS]:.1e}"] if OURS in row.errors else []
    if row.checked_images:
        parts.append(f"checked in {row.seconds_checking:.1f} s")
        parts.append(f"timed in {row.seconds_timing:.1f} s")
    return ", ".join([*parts, *filter(None, [_status(row)])])


def print_table(rows: Sequence[Row], to: Console) -> None:
    shown = columns(rows)
    table = Table(header_style="bold")
    for heading, _ in shown:
        numeric = heading.endswith(("ms", "ratio", "rate", "floor", "error", "MiB"))
        table.add_column(heading, justify="right" if numeric else "left")
    for row in rows:
        style = {OK: None, REFUSED: "dim"}.get(row.status, "red")
        table.add_row(*(cell(row) for _, cell in shown), style=style)
    to.print(table)
    for text in summary(rows):
        to.print(text)


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric mean and worst ratio of each group of rows that one may compare."""
    return ratio_summary(
        rows,
        lambda row: (
            f"{row.algorithm}, {DIRECTION_NAMES[row.direction]}, {row.precision}, {row.layout}"
        ),
        lambda row: row.problem,
    )


def ratio_summary(
    rows: Sequence[Any], kind: Callable[[Any], str], name: Callable[[Any], str]
) -> list[str]:
    """Geometric mean and worst of the rows' `ratio`, those of a kind together."""
    groups: dict[str, list[Any]] = {}
    for row in rows:
        if row.ratio:
            groups.setdefault(kind(row), []).append(row)
    lines = []
    for text, group in groups.items():
        mean = statistics.geometric_mean(row.ratio for row in group)
        worst = min(group, key=lambda row: row.ratio)
        lines.append(
            f"{text}: ratio {mean:.2f} in the geometric mean of {len(group)}, "
            f"least {worst.ratio:.2f} ({name(worst)})"
        )
    return lines


def losses(rows: Sequence[Row]) -> list[str]:
    """The rows in which conv_ops is slower than the better rival, the worst first."""
    slower = sorted(
        (row for row in rows if row.ratio and row.ratio < 1), key=lambda r: r.ratio or 0
    )
    return [
        f"{row.problem} {DIRECTION_NAMES[row.direction]} {row.precision} {row.layout} "
        f"({_algorithm(row)}) {_number(row.ratio, '.2f')}"
        for row in sorted(slower, key=lambda row: row.ratio or 0)
    ]


def result_stem(directory: Path, machine: dict[str, Any], name: str) -> Path:
    """The result files' path without suffix: <date>-<device>-<name>."""
    date = datetime.fromisoformat(machine["date"]).date()
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return directory / f"{date}-{device}-{name}"


def save_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def markdown_head(title: str, content: dict[str, Any]) -> list[str]:
    """How the numbers of a result file came about."""
    machine = content["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    state = machine["gpu_state"]
    lines = [
        f"# {title}",
        "",
        f"- {machine['device']}, {machine['date']}, commit `{machine['commit']}`",
        f"- CPU: {machine['cpu']}, {machine['cores']} cores",
        f"- {versions}",
    ]
    if state:
        lines.append("- nvidia-smi: " + ", ".join(f"{k} {v}" for k, v in state.items()))
    return [*lines, f"- `{content['command']}`"]


def markdown_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    def text(values: Sequence[str]) -> str:
        return "| " + " | ".join(v.replace("|", r"\|") for v in values) + " |"

    return [text(headings), text(["---"] * len(headings)), *map(text, cells)]


def save_markdown(path: Path, content: dict[str, Any], rows: Sequence[Row]) -> None:
    ceilings = content["ceilings"]
    rates = ", ".join(f"{k} {v * 1e-12:.3g} TFLOP/s" for k, v in ceilings["rates"].items())
    shapes = dict.fromkeys(f"{row.problem} = {row.shape}" for row in rows)
    shown = columns(rows)
    lines = [
        *markdown_head(path.stem, content),
        f"- measured ceilings: copy {ceilings['bandwidth'] * 1e-12:.3g} TB/s, {rates}",
        "",
        *markdown_table([h for h, _ in shown], [[cell(r) for _, cell in shown] for r in rows]),
        "",
        "ratio: the better rival's median time over conv_ops'. of floor: the time the measured "
        "ceilings allow over conv_ops' time. error: relative Frobenius error against fp64. "
        f"workspace: peak, limit {rows[0].workspace_limit / 2**20:.0f} MiB. docs/benchmarking.md "
        "tells how.",
        "",
        *(f"- {text}" for text in summary(rows)),
        "",
        f"Slower than the better rival: {'; '.join(losses(rows)) or 'none'}.",
        "",
        "Problems: " + "; ".join(shapes) + ".",
        "",
        f"One row again (each row's own command is in the JSON): `{rows[0].command}`",
    ]
    path.write_text("\n".join(lines) + "\n")
