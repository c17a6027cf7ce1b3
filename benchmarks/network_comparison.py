"""A network converted and unconverted: check, then time, then name the layers at fault."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import contestants, layers, measure, report
from benchmarks.comparison import FAILED, OK, OURS, WRONG, first_line
from benchmarks.contestants import PYTORCH_BENCHMARK, PYTORCH_DEFAULT, Contestant
from benchmarks.networks import NetworkCase, Runner
from benchmarks.reference import UNIT_ROUNDOFF, without_cudnn

# A turn of a contestant is as many passes as this takes, so that the wait at its end is nothing.
_TURN_MS = 20.0
_MOST_PASSES = 50
# Errors grow from layer to layer, differently in each network. What the precision costs a network
# is what it costs PyTorch; ours may be this many times that.
_TIMES_PYTORCHS_ERROR = 3.0
# Where PyTorch is exact by luck: this many roundings.
_ROUNDINGS = 16
_SHOWN_LAYERS = 5


@dataclass
class NetworkRow:
    """One measured case; what the result files hold. `times` and `errors` are by contestant."""

    network: str
    work: str
    batch: int
    precision: str
    layout: str
    execution: str
    size: int
    device: str
    command: str = ""
    convolutions: int = 0
    status: str = OK
    note: str = ""
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    ratio: float | None = None  # the best rival's median over ours
    layers: list[dict[str, Any]] = field(default_factory=list)
    seconds_checking: float = 0.0
    seconds_timing: float = 0.0


@dataclass(frozen=True)
class Results:
    """What a step computes: the output and, in training, gradients of convolutions' weights."""

    output: Tensor
    gradients: dict[str, Tensor]

    @staticmethod
    def of(runner: Runner) -> Results:
        output = runner.step(update=False).clone()
        if not runner.case.training:
            return Results(output, {})
        return Results(output, {name: g.clone() for name, g in runner.gradients().items()})

    def errors(self, exact: Results) -> dict[str, float]:
        """Relative Frobenius errors: of the output, and of the gradient that is furthest off."""

        def error(value: Tensor, reference: Tensor) -> float:
            return ((value.double() - reference).norm() / reference.norm()).item()

        result = {"output": error(self.output, exact.output)}
        if self.gradients:
            result["gradients"] = max(
                error(self.gradients[name], reference)
                for name, reference in exact.gradients.items()
            )
        return result


def exact_results(model: nn.Module, case: NetworkCase) -> Results:
    """The unconverted network's results in float64."""
    with without_cudnn(), torch.no_grad():
        return Results.of(Runner(model, case, exact=True))


@dataclass(frozen=True)
class NetworkBench:
    """What stays the same from case to case.

    Attributes:
        searches: whether cudnn.benchmark=True is measured, too.
        layers: of which cases the layers are measured: "none", "losses" or "all".
    """

    clock: measure.WallClock
    effort: measure.Effort
    searches: bool
    layers: str

    def row(
        self, case: NetworkCase, model: nn.Module, smooth: nn.Module, exact: Results
    ) -> NetworkRow:
        """Measures a case.

        Args:
            model: what is timed.
            smooth: what is checked (see `networks.smoothed`).
            exact: the results of `smooth`.
        """
        words = case.network, case.work, case.batch, case.precision, case.layout, case.execution
        row = NetworkRow(*words, case.size, case.device.type)
        try:
            with contestants.torch_precision(case.precision):
                self._fill(row, case, model, smooth, exact)
        except (RuntimeError, ValueError) as error:
            # Out of memory, or a profile that lacks a convolution: the other cases go on.
            row.status, row.note = FAILED, first_line(error)
        finally:
            if case.execution == "compile":
                torch.compiler.reset()
        return row

    def _fill(
        self,
        row: NetworkRow,
        case: NetworkCase,
        model: nn.Module,
        smooth: nn.Module,
        exact: Results,
    ) -> None:
        start = time.perf_counter()
        for label, (side, runner) in self._sides(smooth, case).items():
            results = side.run(lambda _, runner=runner: Results.of(runner))
            row.errors[label] = results.errors(exact)
        least = _ROUNDINGS * UNIT_ROUNDOFF[case.precision]
        row.bounds = {
            what: max(least, _TIMES_PYTORCHS_ERROR * error)
            for what, error in row.errors[PYTORCH_DEFAULT].items()
        }
        checked = time.perf_counter()
        row.seconds_checking = checked - start
        if not all(row.errors[OURS][what] <= bound for what, bound in row.bounds.items()):
            row.status = WRONG
            return

        sides = self._sides(model, case)
        row.convolutions = len(sides[OURS][1].convolutions())
        row.times = self._times([side for side, _ in sides.values()])
        medians = {label: each["median_ms"] for label, each in row.times.items()}
        best = min((label for label in medians if label != OURS), key=lambda label: medians[label])
        row.ratio = medians[best] / medians[OURS]
        row.seconds_timing = time.perf_counter() - checked
        wanted = self.layers == "all" or (self.layers == "losses" and row.ratio < 1)
        if wanted and case.execution == "eager":
            row.layers = [vars(layer) for layer in layers.compare(sides[OURS], sides[best])]

    def _sides(self, model: nn.Module, case: NetworkCase) -> dict[str, tuple[Contestant, Runner]]:
        """conv_ops and PyTorch's modes by label."""
        theirs = Runner(model, case)
        runners = {OURS: Runner(model, case, converted=True), PYTORCH_DEFAULT: theirs}
        if self.searches:
            runners[PYTORCH_BENCHMARK] = theirs
        return {
            label: (Contestant(label, runner.step, label == PYTORCH_BENCHMARK), runner)
            for label, runner in runners.items()
        }

    def _times(self, sides: list[Contestant]) -> dict[str, dict[str, float]]:
        """Milliseconds of a pass."""
        for side in sides:
            side.run(lambda call: call())  # allocates
        once = min(side.run(self.clock.milliseconds) for side in sides)
        passes = min(_MOST_PASSES, max(1, round(_TURN_MS / once)))

        def repeated(call: Callable[[], Tensor]) -> Callable[[], None]:
            def calls() -> None:
                for _ in range(passes):
                    call()

            return calls

        turns = [
            Contestant(side.label, repeated(side.call), side.cudnn_benchmark) for side in sides
        ]
        times = measure.compare(turns, self.clock, self.effort)
        for each in times.values():
            for key in ("median_ms", "min_ms", "max_ms"):
                each[key] /= passes
        return times


# ---- What is shown ---------------------------------------------------------------------------

_COLUMNS = "network", "work", "batch", "precision", "layout", "execution"


def _headings(rows: list[NetworkRow]) -> list[str]:
    labels = dict.fromkeys(label for row in rows for label in row.times)
    headings = [*_COLUMNS, *(f"{label} ms" for label in labels), "ratio"]
    kinds = dict.fromkeys(kind for row in rows for kind in row.bounds)
    return [*headings, *(f"{kind} error (PyTorch's)" for kind in kinds), ""]


def _cells(row: NetworkRow, headings: list[str]) -> list[str]:
    values = {column: str(getattr(row, column)) for column in _COLUMNS}
    values |= {f"{label} ms": f"{each['median_ms']:.4g}" for label, each in row.times.items()}
    values["ratio"] = f"{row.ratio:.2f}" if row.ratio else ""
    for kind in row.bounds:
        errors = row.errors[OURS][kind], row.errors[PYTORCH_DEFAULT][kind]
        values[f"{kind} error (PyTorch's)"] = "{:.1e} ({:.1e})".format(*errors)
    values[""] = "" if row.status == OK else f"{row.status}: {row.note}".rstrip(": ")
    return [values.get(heading, "") for heading in headings]


def line(row: NetworkRow) -> str:
    """A row in one line, for the log of a run."""
    headings = _headings([row])
    cells = zip(headings, _cells(row, headings), strict=True)
    parts = [
        cell if heading in _COLUMNS else f"{heading} {cell}" for heading, cell in cells if cell
    ]
    parts.append(f"checked in {row.seconds_checking:.1f} s, timed in {row.seconds_timing:.1f} s")
    return ", ".join([*parts, *losses(row)])


def losses(row: NetworkRow) -> list[str]:
    """The layers that lose most, and what all convolutions together gain or lose."""
    if not row.layers:
        return []
    ours, theirs = (sum(each[side] for each in row.layers) for side in ("ours_ms", "theirs_ms"))
    lines = [f"convolutions {ours:.3g} ms against {theirs:.3g} ms"]
    for each in row.layers[:_SHOWN_LAYERS]:
        if each["ours_ms"] > each["theirs_ms"]:
            lines.append(
                f"{each['modules'][0]} ({each['shape']}, {len(each['modules'])} of them) "
                f"{each['part']} {each['ours_ms']:.3g} ms by {each['algorithms']} "
                f"against {each['theirs_ms']:.3g} ms"
            )
    return lines


def summary(rows: list[NetworkRow]) -> list[str]:
    """Geometric mean and worst ratio over the networks, of each kind of pass."""
    return report.ratio_summary(
        rows,
        lambda row: (
            f"{row.work}, batch {row.batch}, {row.precision}, {row.layout}, {row.execution}"
        ),
        lambda row: row.network,
    )


def print_table(rows: list[NetworkRow], to: Console) -> None:
    headings = _headings(rows)
    table = Table(*headings, header_style="bold")
    for row in rows:
        table.add_row(*_cells(row, headings), style=None if row.status == OK else "red")
    to.print(table)
    for text in summary(rows):
        to.print(text)


def save_markdown(path: Path, content: dict[str, Any], rows: list[NetworkRow]) -> None:
    headings = _headings(rows)
    ratios = [row.ratio for row in rows if row.ratio]
    slower = sorted((row for row in rows if row.ratio and row.ratio < 1), key=lambda r: r.ratio)
    lines = [
        *report.markdown_head(path.stem, content),
        "",
        *report.markdown_table(headings, [_cells(row, headings) for row in rows]),
        "",
        "Milliseconds of a pass, host time included. ratio: the better rival's median time over "
        "conv_ops'. error: relative Frobenius error against float64, of gradients the largest of "
        "any convolution's weight. docs/benchmarking.md tells how.",
        "",
        *(f"- {text}" for text in summary(rows)),
        "",
        f"Slower than the better rival: {len(slower)} of {len(ratios)}, the worst first, with the "
        "layers (device time) that lose most:"
        if slower
        else "Nowhere slower than the better rival.",
        "",
    ]
    for row in slower:
        words = [str(getattr(row, column)) for column in _COLUMNS]
        lines.append("- " + "; ".join([f"{' '.join(words)}: {row.ratio:.2f}", *losses(row)]))
    path.write_text("\n".join(lines).rstrip() + "\n")
