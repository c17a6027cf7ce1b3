"""One case, all contestants: check, then time. A row of the table for each algorithm of ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import conv_ops
from benchmarks import contestants, measure, reference
from benchmarks.cases import Case, Tensors
from benchmarks.ceilings import TF32_THREE_TIMES, Ceilings
from benchmarks.contestants import Contestant

OURS = "conv_ops"

# A row's status. Only the first two are no fault of ours.
OK, REFUSED, WRONG, OVER_LIMIT, FAILED = "ok", "refused", "wrong", "over limit", "failed"


@dataclass
class Row:
    """One measured comparison; what the result files hold.

    `times`, `errors` and `workspace` (bytes) are by contestant, ours under "conv_ops".
    """

    problem: str
    shape: str
    direction: str
    precision: str
    layout: str
    device: str
    algorithm: str  # as asked for: a name or "plan"
    command: str = ""  # measures this row again
    chosen: str | None = None  # what ran
    status: str = OK
    note: str = ""
    gflop: float = 0.0
    megabytes: float = 0.0
    memory_bound: bool = False
    floor_ms: float = 0.0
    floor_3xtf32_ms: float | None = None
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error_bound: float = 0.0
    checked_images: int = 0
    workspace: dict[str, int | None] = field(default_factory=dict)
    workspace_limit: int = 0
    ratio: float | None = None  # the best rival's median over ours
    fraction: float | None = None  # floor over our median
    fraction_3xtf32: float | None = None
    seconds_checking: float = 0.0
    seconds_timing: float = 0.0


@dataclass(frozen=True)
class Bench:
    """What stays the same from case to case."""

    clock: measure.Clock
    effort: measure.Effort
    ceilings: Ceilings
    rivals: Callable[[Case, Tensors], list[Contestant]]

    def rows(self, case: Case, algorithms: Sequence[str]) -> list[Row]:
        """Measures a case.

        Args:
            algorithms: names; "plan" for the plan's choice; "all" for all that can run it.
        """
        ceilings = self.ceilings
        three = TF32_THREE_TIMES if case.precision == "ieee" else None
        floor_3xtf32 = ceilings.floor_ms(case, three) if three in ceilings.rates else None

        def new_row(algorithm: str) -> Row:
            return Row(
                problem=case.problem.name,
                shape=case.shape,
                direction=case.direction,
                precision=case.precision,
                layout=case.layout,
                device=case.device.type,
                algorithm=algorithm,
                gflop=case.flops * 1e-9,
                megabytes=case.bytes * 1e-6,
                memory_bound=ceilings.memory_bound(case, case.precision),
                floor_ms=ceilings.floor_ms(case, case.precision),
                floor_3xtf32_ms=floor_3xtf32,
                error_bound=reference.bound(case),
                workspace_limit=conv_ops.settings.get().workspace_limit,
            )

        try:
            if case.device.type == "cuda":
                torch.cuda.empty_cache()  # what one case leaves must not starve the next
            tensors = case.tensors()
            listed = {c["algorithm"]: c for c in contestants.candidates(case, tensors)}
            able = [name for name, c in listed.items() if not c["reason"]]
            algorithms = [n for a in algorithms for n in (able if a == "all" else [a])]
            rows = {name: new_row(name) for name in algorithms}
            with contestants.torch_precision(case.precision):
                self._fill(rows, listed, case, tensors)
        except RuntimeError as error:  # out of memory: no reason to lose the other cases
            rows = {name: new_row(name) for name in algorithms}
            for row in rows.values():
                row.status, row.note = FAILED, first_line(error)
        return list(rows.values())

    def _fill(
        self,
        rows: dict[str, Row],
        listed: dict[str, dict[str, Any]],
        case: Case,
        tensors: Tensors,
    ) -> None:
        able = [name for name, row in rows.items() if _admit(row, listed)]
        ours = [contestants.convops(case, tensors, name) for name in able]
        rivals = self.rivals(case, tensors)

        start = time.perf_counter()
        outputs: dict[str, Tensor] = {}
        workspace: dict[str, int | None] = {}
        failures: dict[str, str] = {}
        for contestant in [*ours, *rivals]:
            label = contestant.label
            try:
                outputs[label], workspace[label] = measure.first_result(
                    contestant, _result_like(case, tensors)
                )
            except RuntimeError as error:
                failures[label] = first_line(error)
        errors, images = reference.errors(case, tensors, outputs)
        outputs.clear()
        checked = time.perf_counter()

        right = [c for c in ours if errors.get(c.label, torch.inf) <= reference.bound(case)]
        standing = [c for c in rivals if c.label not in failures]
        times = measure.compare([*right, *standing], self.clock, self.effort) if right else {}
        timed = time.perf_counter()

        for name in able:
            row = rows[name]
            row.checked_images = images
            row.seconds_checking, row.seconds_timing = checked - start, timed - checked
            labels = {OURS: name} | {c.label: c.label for c in rivals}
            row.errors = {k: errors[v] for k, v in labels.items() if v in errors}
            row.times = {k: times[v] for k, v in labels.items() if v in times}
            row.workspace = {k: workspace[v] for k, v in labels.items() if v in workspace}
            row.note = "; ".join(f"{k}: {failures[v]}" for k, v in labels.items() if v in failures)
            _judge(row)


def _admit(row: Row, listed: dict[str, dict[str, Any]]) -> bool:
    """Whether the row's algorithm can run the case; the row is told which one, or why not."""
    if row.algorithm == "plan":
        row.chosen = next((name for name, c in listed.items() if c["chosen"]), None)
        return True
    if row.algorithm not in listed:
        row.note = f"no such algorithm; there are {', '.join(listed)}"
    else:
        row.note = listed[row.algorithm]["reason"]
    if row.note:
        row.status = REFUSED
        return False
    row.chosen = row.algorithm
    return True


def _judge(row: Row) -> None:
    """Status, ratio and fractions, from errors, times and workspace."""
    if OURS not in row.errors:
        row.status = FAILED
    elif OURS not in row.times:
        row.status = WRONG
    elif (row.workspace[OURS] or 0) > row.workspace_limit:
        row.status = OVER_LIMIT
    if OURS in row.times:
        median = row.times[OURS]["median_ms"]
        others = [t["median_ms"] for k, t in row.times.items() if k != OURS]
        row.ratio = min(others) / median if others else None
        row.fraction = row.floor_ms / median
        if row.floor_3xtf32_ms:
            row.fraction_3xtf32 = row.floor_3xtf32_ms / median


def _result_like(case: Case, t: Tensors) -> Tensor:
    return {
        "forward": t.grad_output,
        "backward_input": t.input,
        "backward_weight": t.weight,
    }[case.direction]


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
