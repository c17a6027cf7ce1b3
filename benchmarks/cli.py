"""The command line: `conv` (what runs without a name), `unfold`, `overhead`, `report`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks import cases, ceilings, contestants, machine, measure, overhead, plot, report
from benchmarks.cases import Case
from benchmarks.comparison import OK, REFUSED, Bench, Row

RESULTS = cases.ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str]) -> int:
    """Runs the program; returns its exit status: 0 if every result is right and in its limits."""
    arguments = list(arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "conv")
    parser = _parser()
    args = parser.parse_args(arguments)
    args.command_line = shlex.join(["python", "-m", "benchmarks", *arguments])
    try:
        return args.run(args)
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures conv_ops. Without a sub-command: conv.",
        epilog="docs/benchmarking.md tells how the numbers are made.",
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")

    conv = _add(commands, "conv", "conv_ops against PyTorch's convolution")
    _add_comparison(conv, ["KERNELBENCH"], ["all"], ["plan"])
    conv.set_defaults(run=_compare, rivals=contestants.pytorch)

    by_hand = _add(commands, "unfold", "im2col_gemm and direct against F.unfold + matmul")
    _add_comparison(by_hand, ["SEEDS"], ["forward"], ["im2col_gemm", "direct"])
    by_hand.set_defaults(run=_compare, rivals=contestants.unfold)

    host = _add(commands, "overhead", "host time of a call on a tiny problem")
    host.add_argument("--rounds", type=int, default=25, help="turns of a function (%(default)s)")
    host.add_argument("--calls", type=int, default=500, help="calls in a turn (%(default)s)")
    host.set_defaults(run=_overhead)

    again = commands.add_parser("report", help="rewrites table and plot of a JSON result")
    again.add_argument("json", type=Path, nargs="+")
    again.set_defaults(run=_report)
    return parser


def _add(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--name", default=name, help="last part of their name (%(default)s)")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    devices = ["cuda", "cpu"]
    parser.add_argument("--device", choices=devices, help="default: cuda, where there is one")
    return parser


def _add_comparison(
    parser: argparse.ArgumentParser,
    problems: list[str],
    directions: list[str],
    algorithms: list[str],
) -> None:
    def some(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, nargs="+", metavar="X", help=text, **options)

    def one(name: str, text: str, default: Any, kind: type) -> None:
        parser.add_argument(name, metavar="N", help=text, default=default, type=kind)

    every = (*cases.DIRECTIONS, "all")
    some("--problem", "names, globs, tags of tests/problems.py (%(default)s)", default=problems)
    some("--direction", f"of {', '.join(every)} (%(default)s)", choices=every, default=directions)
    precisions, layouts = tuple(cases.DTYPES), tuple(cases.LAYOUTS)
    some("--precision", f"of {', '.join(precisions)} (ieee; cuda: and tf32)", choices=precisions)
    some("--layout", f"of {', '.join(layouts)} (nchw)", choices=layouts, default=["nchw"])
    some("--algorithm", "names, plan (its choice) or all (%(default)s)", default=algorithms)
    effort = measure.Effort()
    one("--elements", "scale problems to this many elements (cpu: 2^20)", None, int)
    one("--rounds", "least rounds of a case (%(default)s)", effort.least, int)
    one("--most-rounds", "most rounds of a case (%(default)s)", effort.most, int)
    one("--seconds", "time for a case's rounds (%(default)s)", effort.seconds, float)


def _device(args: argparse.Namespace) -> torch.device:
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    problems = cases.select(args.problem)
    if args.elements is None and device.type == "cpu":
        args.elements = 1 << 20
    if args.elements:
        problems = [problem.scaled(args.elements) for problem in problems]
    directions = cases.DIRECTIONS if "all" in args.direction else args.direction
    precisions = args.precision or (["ieee", "tf32"] if device.type == "cuda" else ["ieee"])
    return [
        Case(problem, direction, precision, layout, device)
        for problem in problems
        for direction in directions
        for precision in precisions
        for layout in args.layout
    ]


def _repeat(name: str, case: Case, algorithm: str, elements: int | None) -> str:
    """The command line that measures one row again."""
    words = ["python", "-m", "benchmarks", name, "--problem", case.problem.name]
    words += ["--direction", case.direction, "--precision", case.precision]
    words += ["--layout", case.layout, "--algorithm", algorithm, "--device", case.device.type]
    return shlex.join(words + (["--elements", str(elements)] if elements else []))


def _compare(args: argparse.Namespace) -> int:
    device = _device(args)
    chosen = _cases(args, device)
    if args.rivals is contestants.unfold and any(case.direction != "forward" for case in chosen):
        raise ValueError("unfold + matmul is a forward convolution")
    screen = report.console()
    clock = measure.clock_for(device)
    screen.print("Measuring the machine's ceilings ...")
    tops = ceilings.measure(device, [case.precision for case in chosen], clock)
    effort = measure.Effort(args.rounds, args.most_rounds, args.seconds)
    bench = Bench(clock, effort, tops, args.rivals)

    content: dict[str, Any] = {
        "kind": "comparison",
        "command": args.command_line,
        "machine": machine.describe(device, args.commit),
        "ceilings": asdict(tops),
        "effort": asdict(effort),
        "rows": [],
    }
    stem = report.result_stem(args.output, content["machine"], args.name)
    rows: list[Row] = []
    fields = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*fields, console=screen) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=str(case))
            for row in bench.rows(case, args.algorithm):
                row.command = _repeat(args.command, case, row.algorithm, args.elements)
                rows.append(row)
                content["rows"].append(asdict(row))
                screen.print(report.line(row), highlight=False)
            report.save_json(_suffixed(stem, "json"), content)  # a crash later loses nothing
            progress.advance(task)
    content["machine"]["gpu_state_after"] = machine.gpu_state(device)
    report.save_json(_suffixed(stem, "json"), content)
    _save_comparison(stem, content, rows)
    report.print_table(rows, screen)
    screen.print(f"Written: {stem}.json, .md, .png")

    bad = [row for row in rows if row.status not in (OK, REFUSED)]
    for row in bad:
        screen.print(f"{row.status}: {row.note or row.errors} {row.command}", style="red")
    return 1 if bad else 0


def _save_comparison(stem: Path, content: dict[str, Any], rows: list[Row]) -> None:
    if rows:
        report.save_markdown(_suffixed(stem, "md"), content, rows)
        plot.save(_suffixed(stem, "png"), _title(content), rows)


def _title(content: dict[str, Any]) -> str:
    about = content["machine"]
    versions = about["versions"]
    cudnn = f", cuDNN {versions['cudnn']}" if versions["cudnn"] else ""
    return f"conv_ops {versions['conv_ops']} on {about['device']}, torch {versions['torch']}{cudnn}"


def _suffixed(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}.{suffix}")  # with_suffix would cut a dotted name


def _overhead(args: argparse.Namespace) -> int:
    devices = [args.device] if args.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    screen = report.console()
    rows = [
        row
        for device in devices
        for row in overhead.measure(torch.device(device), args.rounds, args.calls, screen)
    ]
    content = {
        "kind": "overhead",
        "command": args.command_line,
        "machine": machine.describe(torch.device(devices[-1]), args.commit),
        "rows": [asdict(row) for row in rows],
    }
    stem = report.result_stem(args.output, content["machine"], args.name)
    report.save_json(_suffixed(stem, "json"), content)
    overhead.save_markdown(_suffixed(stem, "md"), content, rows)
    overhead.print_table(rows, screen)
    screen.print(f"Written: {stem}.json, .md")
    return 0


def _report(args: argparse.Namespace) -> int:
    for path in args.json:
        content = json.loads(path.read_text())
        stem = path.with_name(path.name.removesuffix(".json"))
        if content["kind"] == "overhead":
            rows = [overhead.OverheadRow(**row) for row in content["rows"]]
            overhead.save_markdown(_suffixed(stem, "md"), content, rows)
        else:
            _save_comparison(stem, content, [Row(**row) for row in content["rows"]])
    return 0
