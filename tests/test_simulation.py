"""Kernels without a GPU: compiled for the host, on random problems (and plans of implicit_gemm).

tests/simulation/ has a block of threads, the copy engine and the tensor cores in C++, and headers
that stand for CUDA's. The kernels themselves are those of csrc/, every line of them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
CSRC, SIMULATION = ROOT / "csrc", ROOT / "tests/simulation"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

# As the build's, but for what nvcc would not say of a kernel. Device code may read vectors only
# where they are aligned: the host would not mind. (Jumps between stacks are no overflow.)
FLAGS = ["-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Wno-parentheses", "-Wno-psabi"]
FLAGS += ["-Wno-sign-compare"]
FLAGS += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment", "-U_FORTIFY_SOURCE"]
FLAGS += [f"-I{SIMULATION / 'toolkit'}", f"-I{SIMULATION}", f"-I{CSRC}"]  # the first hides CUDA's

GEMM = ["implicit_gemm_sm90", "implicit_gemm_float16_sm90", "implicit_gemm_bfloat16_sm90"]
GEMM += ["implicit_gemm_pack_sm90", "implicit_gemm_exact_sm90"]
# The planner is part of plans.cpp.
GEMM_HOST = [CSRC / f"cuda/implicit_gemm{part}.cpp" for part in ("", "_map", "_cost", "_cells")]
OTHERS = ["depthwise", "depthwise_strips", "depthwise_planes", "depthwise_weight"]
OTHERS += ["depthwise_weight_rows"]
OTHERS += ["depthwise_large", "depthwise_channels_last", "depthwise_channels_last_warps"]
OTHERS += ["depthwise_channels_last_patches", "depthwise_channels_last_weight"]
OTHERS += ["depthwise_channels_last_weight_registers", "grouped", "grouped_weight"]
OTHERS += ["weight_parts", "implicit_gemm_weight_sm90"]
OTHERS += ["implicit_gemm_weight_float16_sm90", "implicit_gemm_weight_bfloat16_sm90"]
OTHERS += ["tma_im2col_sm90", "tma_im2col_float_sm90"]
OTHERS += ["tma_im2col_weight_sm90", "tma_im2col_weight_float_sm90"]
OTHERS += ["copy", "direct"]
OTHERS_NAMES = ("implicit_gemm_weight", "tma_im2col", "tma_im2col_weight")
OTHERS_HOST = [CSRC / f"cuda/{name}.cpp" for name in OTHERS_NAMES]

DONE = "done"  # a file that is there when everything is compiled

# The programs' own files; all others of tests/simulation/ are of both.
GEMM_OWN = ["main", "check", "convolution", "plans"]
OTHERS_OWN = ["algorithms", "problems", "memory"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def compile_with(*arguments: str | Path) -> None:
    done = run(*COMPILER, *arguments, *FLAGS)
    assert done.returncode == 0, done.stderr[-4000:]


def translate(path: Path, to: Path) -> Path:
    """Makes C++ of CUDA: of launches and of the memory they are given."""
    text = path.read_text()
    text = re.sub(
        r"(\w+(?:<[\w, ]+>)?)\s*<<<(.*?)>>>\(",
        r"simulation::launch(\1, \2)(",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];",
        r"\1* const \2 = reinterpret_cast<\1*>(simulation::shared_memory);",
        text,
    )
    to.write_text(text.replace("__noinline__ ", ""))  # a word of libstdc++'s, too
    return to


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs, compiled once, though pytest-xdist has several sessions."""
    if sys.platform != "linux":
        pytest.skip("threads are simulated by what Linux has for it (ucontext.h)")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler ({COMPILER[0]!r}): install one or set CXX")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return compile_programs(tmp_path_factory.mktemp("simulation"))
    directory = tmp_path_factory.getbasetemp().parent / "simulation"  # that all workers share
    with FileLock(f"{directory}.lock"):
        if not (directory / DONE).exists():
            directory.mkdir(exist_ok=True)
            compile_programs(directory)
            (directory / DONE).touch()
    return directory


def compile_programs(directory: Path) -> Path:
    """Makes the programs; skips where the compiler cannot."""
    (directory / "probe.cc").write_text("int main() { return int(_Float16(0)); }")
    probe = run(*COMPILER, *FLAGS, directory / "probe.cc", "-o", directory / "probe")
    if probe.returncode != 0:
        pytest.skip(f"{COMPILER[0]} lacks C++20, _Float16 or a sanitizer: {probe.stderr[-300:]}")

    # Headers before those of csrc/, which include each other by the same names.
    translated = directory / "cuda"
    translated.mkdir(exist_ok=True)
    for header in (CSRC / "cuda").glob("*.cuh"):
        translate(header, translated / header.name)

    # Kernels are compiled in less time with less effort.
    jobs = {name: ("-O1", translated / f"{name}.cpp") for name in [*OTHERS, *GEMM]}
    for name, (_, path) in jobs.items():
        translate(CSRC / f"cuda/{name}.cu", path)
    sources = [*sorted(SIMULATION.glob("*.cpp")), *GEMM_HOST, *OTHERS_HOST, CSRC / "problem.cpp"]
    jobs |= {source.stem: ("-O3", source) for source in sources}

    def compile_one(name: str) -> None:
        effort, source = jobs[name]
        compile_with(effort, f"-I{directory}", "-c", source, "-o", directory / f"{name}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    gemm = {*GEMM, *GEMM_OWN, *(source.stem for source in GEMM_HOST)} - {"implicit_gemm_cells"}
    others = {*OTHERS, *OTHERS_OWN, *(source.stem for source in OTHERS_HOST)}
    for program, leave in {"simulate": others, "algorithms": gemm}.items():
        objects = [directory / f"{name}.o" for name in jobs if name not in leave]
        compile_with(*objects, "-o", directory / program)
    return directory


PLANS = 150  # of every theme
# How many of them must be of a kind, in all and of a theme (convolution.h) what it is for. A change
# of the planner draws others, about as many of each kind; but none must go away unseen.
LEAST = {
    **{"forward": 150, "backward": 150, "groups": 30, "three_products": 120},
    **{"columns_96": 70, "columns_128": 70, "columns_152": 70, "columns_160": 70, "rows_128": 30},
    **{"row_classes": 80, "sum_classes": 25, "two_taps": 150, "deep": 40, "resident": 120},
    **{"snug": 150, "straddling": 40, "cut_rows": 130, "overlap": 70, "by_cells": 100},
    **{"bulk_run_0": 60, "bulk_run_1": 60, "bulk_run_2": 40, "bulk_run_4": 15, "bulk_snug": 40},
    **{"source_kinds": 40, "source_moved": 25},
    **{"boxed": 100, "boxed_gaps": 8, "boxed_edges": 15, "boxed_kinds": 15, "boxed_snug": 25},
    **{"boxed_snug_cut": 5, "lines": 150, "lines_joined": 20, "lines_joined_straddling": 2},
    **{"lines_snug": 40, "lines_snug_cut": 8, "apart": 15, "woven": 120, "paired": 80},
    **{"result_moved": 15, "float16": 200, "bfloat16": 200, "special": 70},
    **{"halves_128": 80, "halves_192": 80, "halves_224": 80, "halves_256": 80},
    **{"halves_bulk": 120, "halves_by_cells": 200, "halves_boxed": 80, "halves_octets_apart": 5},
    **{"halves_direct": 15, "four_consumers": 80},
}
THEMES = {
    "any": {"apart": 8},
    "patches": {"bulk_run_1": 4, "bulk_run_2": 4, "bulk_run_4": 1, "bulk_snug": 5},
    "boxes": {"boxed_snug": 6},
    "rows": {"cut_rows": 30, "boxed": 15},
    "kinds": {"source_kinds": 8, "overlap": 12, "halves_octets_apart": 3},
    "last": {"halves_by_octets": 70, "halves_direct": 10, "halves_across": 15},
    "joined": {"halves_octets_apart": 10, "halves_boxed": 2},
    "images": {"lines_joined": 6, "lines_joined_straddling": 2, "straddling": 15},
}


@pytest.fixture(scope="session")
def simulated(simulator: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """What a theme's run said, which is made once."""
    return cache(lambda theme: run(simulator / "simulate", theme, "1", str(PLANS)))


def covered(done: subprocess.CompletedProcess[str]) -> Counter[str]:
    """Plans of each kind."""
    pairs = map(str.split, done.stdout.splitlines())
    return Counter({kind: int(count) for kind, count in pairs})


def assert_covered(counts: Counter[str], least: dict[str, int]) -> None:
    rare = {kind: counts[kind] for kind in least if counts[kind] < least[kind]}
    assert not rare, f"too few of {rare} in {dict(counts)}"


@pytest.mark.parametrize("theme", THEMES)
def test_every_result_is_right_and_stored_once(
    simulated: Callable[[str], subprocess.CompletedProcess[str]], theme: str
) -> None:
    done = simulated(theme)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert_covered(covered(done), THEMES[theme])


def test_no_kind_of_plan_is_left_out(
    simulated: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    runs = [simulated(theme) for theme in THEMES]
    if any(done.returncode != 0 for done in runs):
        pytest.skip("a simulation failed")
    total = sum(map(covered, runs), Counter())
    print(dict(total))
    assert_covered(total, LEAST)


CASES = {
    **{"direct": 400, "depthwise": 1000, "depthwise_strips": 1000, "depthwise_planes": 600},
    **{"depthwise_weight": 1200},
    **{"depthwise_large": 800, "depthwise_channels_last": 600},
    **{"grouped": 600, "grouped_weight": 500, "implicit_gemm_weight": 400},
    **{"tma_im2col": 600, "tma_im2col_weight": 400},
}
# How many of them must be of a kind (count_kinds in algorithms.cpp): of every algorithm, as a share
# of its cases; of some, in numbers. "kernels" counts different ones: all or nearly all there are.
LEAST_SHARES = {
    **{"special": 0.15, "scaled": 0.01, "repeated": 0.15, "gaps": 0.3, "octets": 0.06},
    **{"asymmetric": 0.2, "padding_beyond": 0.05, "wide": 0.015, "high": 0.008},
    **{"many_images": 0.05, "several_blocks": 0.08, "tf32": 0.07},
}
HALVES = {"float16": 150, "bfloat16": 150, "float32": 150}
PIXELS = {"forward": 150, "backward_input": 150, "bias": 80}
PARTS = {"backward_weight": 150, "no_images": 10, "least_workspace": 15, "full_workspace": 15}
SMALL = {"gaps": 0, "padding_beyond": 0, "wide": 0}  # of depthwise_planes, which refuses such
LEAST_CASES = {
    "direct": {
        **{"float16": 70, "bfloat16": 70, "float32": 70, "float64": 60, "kernels": 28},
        **{"forward": 80, "backward_input": 80, "backward_weight": 80, "bias": 40},
        **{"no_images": 8, "least_workspace": 15, "full_workspace": 15},
    },
    "depthwise": {**HALVES, **PIXELS, "multiplied": 100, "dilated": 150, "kernels": 55},
    "depthwise_strips": {**HALVES, **PIXELS, "float64": 100, "kernels": 74},
    "depthwise_planes": {**PIXELS, **SMALL, "kernels": 6},
    "depthwise_weight": {**HALVES, **PARTS, "multiplied": 120, "dilated": 200, "kernels": 62},
    "depthwise_large": {**HALVES, **PIXELS, **PARTS, "kernels": 22},
    "depthwise_channels_last": {**HALVES, **PIXELS, **PARTS, "kernels": 58},
    "grouped": {**PIXELS, "kernels": 20},
    "grouped_weight": {**PARTS, "kernels": 7},
    "implicit_gemm_weight": {
        **{"float16": 80, "bfloat16": 80, "float32": 80, "least_workspace": 15, "many_images": 3},
        **{"strided": 40, "kernels": 22},
    },
    "tma_im2col": {
        **{"float16": 120, "bfloat16": 120, "float32": 180, "tf32": 80},
        **PIXELS,
        **{"strided": 300, "dilated": 200, "high": 1, "kernels": 30},
    },
    "tma_im2col_weight": {
        **{"float16": 80, "bfloat16": 80, "float32": 80, "many_images": 3},
        **{"strided": 80, "dilated": 80, "wide": 0, "high": 1, "kernels": 28},
    },
}


@pytest.mark.parametrize("algorithm", CASES)
def test_algorithm_is_right_on_random_problems(simulator: Path, algorithm: str) -> None:
    done = run(simulator / "algorithms", algorithm, "1", str(CASES[algorithm]))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    shares = {kind: int(share * CASES[algorithm]) for kind, share in LEAST_SHARES.items()}
    assert_covered(covered(done), shares | LEAST_CASES[algorithm])
