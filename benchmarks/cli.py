"""The command line: `conv` (runs without a name), `unfold`, `networks`, `overhead`, `report`."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from benchmarks import (
    cases,
    ceilings,
    contestants,
    machine,
    measure,
    network_comparison,
    networks,
    overhead,
    plot,
    report,
)
from benchmarks.cases import Case
from benchmarks.comparison import OK, REFUSED, Bench, Row
from benchmarks.network_comparison import NetworkBench, NetworkRow, exact_results
from benchmarks.networks import NetworkCase

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

    whole = _add(commands, "networks", "networks converted by convert_conv2d against PyTorch's")
    _add_networks(whole)
    whole.set_defaults(run=_networks)

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


def _adders(parser: argparse.ArgumentParser) -> tuple[Callable[..., None], Callable[..., None]]:
    """Add an option of several values, and one of one value."""

    def some(name: str, text: str, **options: Any) -> None:
        parser.add_argument(name, nargs="+", metavar="X", help=text, **options)

    def one(name: str, text: str, default: Any, kind: type) -> None:
        parser.add_argument(name, metavar="N", help=text, default=default, type=kind)

    return some, one


def _add_comparison(
    parser: argparse.ArgumentParser,
    problems: list[str],
    directions: list[str],
    algorithms: list[str],
) -> None:
    some, one = _adders(parser)
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


def _add_networks(parser: argparse.ArgumentParser) -> None:
    some, one = _adders(parser)

    def choices(name: str, every: Sequence[str], default: Sequence[str] | None, text: str) -> None:
        some(name, f"of {', '.join(every)} ({text})", choices=every, default=default)

    library = "or any of torchvision and timm"
    some("--network", f"names: {', '.join(networks.NETWORKS)} (all), {library}", default=None)
    choices("--work", networks.WORKS, networks.WORKS, "both")
    some("--batch", "images of a pass (64, inference 1, too; cpu: 1)", type=int, default=None)
    choices("--precision", networks.PRECISIONS, None, "all; cpu: ieee bf16")
    choices("--layout", tuple(cases.LAYOUTS), tuple(cases.LAYOUTS), "both")
    choices("--execution", networks.EXECUTIONS, ["eager"], "eager")
    one("--size", "height and width of the images (%(default)s)", 224, int)
    every = ["losses", "all", "none"]
    text = "of which cases the convolutions are measured one by one (%(default)s)"
    parser.add_argument("--layers", choices=every, default="losses", help=text)
    text = "measure PyTorch with cudnn.benchmark=True, too: 0.1 to 0.5 s of search a convolution"
    boolean = argparse.BooleanOptionalAction
    parser.add_argument("--cudnn-benchmark", action=boolean, default=False, help=text)
    effort = measure.Effort(least=3, seconds=0.1)
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


def _networks(args: argparse.Namespace) -> int:
    device = _device(args)
    cuda = device.type == "cuda"
    steps = list(itertools.product(args.work, args.batch or ([1, 64] if cuda else [1])))
    if cuda and not args.batch:
        steps = [step for step in steps if step != ("training", 1)]
    precisions = args.precision or [p for p in networks.PRECISIONS if cuda or p != "tf32"]
    screen = report.console()
    effort = measure.Effort(args.rounds, args.most_rounds, args.seconds)
    bench = NetworkBench(
        measure.WallClock(device), effort, cuda and args.cudnn_benchmark, args.layers
    )
    content: dict[str, Any] = {
        "kind": "networks",
        "command": args.command_line,
        "machine": machine.describe(device, args.commit),
        "effort": asdict(effort),
        "rows": [],
    }
    stem = report.result_stem(args.output, content["machine"], args.name)
    rows: list[NetworkRow] = []
    for name in args.network or networks.NETWORKS:
        model = networks.build(name, device, args.size)
        smooth = networks.smoothed(model, device, args.size)
        for work, batch in steps:
            exact = None
            for choice in itertools.product(precisions, args.layout, args.execution):
                case = NetworkCase(name, work, batch, *choice, args.size, device)
                exact = exact or exact_results(smooth, case)
                row = bench.row(case, model, smooth, exact)
                row.command = _repeat_network(case)
                rows.append(row)
                content["rows"].append(asdict(row))
                screen.print(network_comparison.line(row), highlight=False, soft_wrap=True)
                # What ends the run loses nothing.
                report.save_json(_suffixed(stem, "json"), content)
                network_comparison.save_markdown(_suffixed(stem, "md"), content, rows)
    content["machine"]["gpu_state_after"] = machine.gpu_state(device)
    report.save_json(_suffixed(stem, "json"), content)
    network_comparison.print_table(rows, screen)
    screen.print(f"Written: {stem}.json, .md")
    return 1 if any(row.status != OK for row in rows) else 0


def _repeat_network(case: NetworkCase) -> str:
    """The command line that measures one row again."""
    words = ["python", "-m", "benchmarks", "networks", "--network", case.network]
    words += ["--work", case.work, "--batch", str(case.batch), "--precision", case.precision]
    words += ["--layout", case.layout, "--execution", case.execution]
    return shlex.join([*words, "--size", str(case.size), "--device", case.device.type])


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
        elif content["kind"] == "networks":
            rows = [NetworkRow(**row) for row in content["rows"]]
            network_comparison.save_markdown(_suffixed(stem, "md"), content, rows)
        else:
            _save_comparison(stem, content, [Row(**row) for row in content["rows"]])
    return 0
