"""What a call costs the host: microseconds of a convolution too small to compute."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import conv_ops
from benchmarks import report

MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "forward with grad": torch.enable_grad,
    "forward + backward": torch.enable_grad,
}


@dataclass
class OverheadRow:
    """The host time of one function in one mode, and its ratio to PyTorch's counterpart."""

    device: str
    mode: str
    function: str
    median_us: float
    min_us: float
    max_us: float
    rounds: int
    counterpart: str
    ratio: float


@dataclass(frozen=True)
class Function:
    """Something that convolves, PyTorch's counterpart, and what it has gradients for."""

    name: str
    counterpart: str
    call: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]


def _functions(device: torch.device) -> list[Function]:
    theirs = nn.Conv2d(1, 1, 3, padding=1).to(device)
    ours = conv_ops.Conv2d(1, 1, 3, padding=1).to(device)
    weight, bias = theirs.weight, theirs.bias
    aten, op, function = F.conv2d, torch.ops.convops.conv2d, conv_ops.conv2d
    own = (weight, bias)
    return [
        Function("F.conv2d", "F.conv2d", lambda x: aten(x, weight, bias, 1, 1), own),
        Function("torch.ops.convops.conv2d", "F.conv2d", lambda x: op(x, weight, bias, 1, 1), own),
        Function("conv_ops.conv2d", "F.conv2d", lambda x: function(x, weight, bias, 1, 1), own),
        Function("nn.Conv2d", "nn.Conv2d", theirs, tuple(theirs.parameters())),
        Function("conv_ops.Conv2d", "nn.Conv2d", ours, tuple(ours.parameters())),
    ]


def _timer(mode: str, function: Function, device: torch.device) -> Timer:
    x = torch.randn(1, 1, 4, 4, device=device, requires_grad=True)
    names: dict[str, Any] = {"call": function.call, "x": x}
    if mode != "forward + backward":
        return Timer("call(x)", globals=names)
    names |= {
        "grad": torch.autograd.grad,
        "of": (x, *function.parameters),
        "dy": torch.ones_like(x),
    }
    return Timer("grad(call(x), of, dy)", globals=names)


def measure(device: torch.device, rounds: int, calls: int, to: Console) -> list[OverheadRow]:
    """Times all functions in turn, `calls` calls a turn, `rounds` times; medians of the turns."""
    functions = _functions(device)
    rows = []
    with Progress(console=to) as progress:
        task = progress.add_task(f"overhead, {device.type}", total=len(MODES) * rounds)
        for mode, context in MODES.items():
            timers = {f.name: _timer(mode, f, device) for f in functions}
            samples: dict[str, list[float]] = {f.name: [] for f in functions}
            with context():
                for timer in timers.values():
                    timer.timeit(calls)  # warms up
                for _ in range(rounds):
                    for name, timer in timers.items():
                        samples[name].append(1e6 * timer.timeit(calls).mean)
                    progress.advance(task)
            medians = {name: statistics.median(values) for name, values in samples.items()}
            rows += [
                OverheadRow(
                    device=device.type,
                    mode=mode,
                    function=f.name,
                    median_us=medians[f.name],
                    min_us=min(samples[f.name]),
                    max_us=max(samples[f.name]),
                    rounds=rounds,
                    counterpart=f.counterpart,
                    ratio=medians[f.name] / medians[f.counterpart],
                )
                for f in functions
            ]
    return rows


_COLUMNS = ("device", "mode", "function", "microseconds", "least", "most", "times PyTorch's")


def _cells(row: OverheadRow) -> tuple[str, ...]:
    numbers = (f"{us:.2f}" for us in (row.median_us, row.min_us, row.max_us))
    ratio = "" if row.function == row.counterpart else f"{row.ratio:.2f}x {row.counterpart}"
    return row.device, row.mode, row.function, *numbers, ratio


def print_table(rows: list[OverheadRow], to: Console) -> None:
    table = Table(*_COLUMNS, header_style="bold")
    for row in rows:
        table.add_row(*_cells(row), end_section=row.function == "conv_ops.Conv2d")
    to.print(table)


def save_markdown(path: Path, content: dict[str, Any], rows: list[OverheadRow]) -> None:
    lines = [
        *report.markdown_head(path.stem, content),
        "",
        "Host time of a call: input 1x1x4x4, kernel 3x3, padding 1, bias, float32.",
        "",
        *report.markdown_table(_COLUMNS, [_cells(row) for row in rows]),
    ]
    path.write_text("\n".join(lines) + "\n")
