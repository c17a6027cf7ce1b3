"""The kernels of implicit_gemm without a GPU: compiled for the host, on random problems and plans.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC, SIMULATION = ROOT / "csrc", ROOT / "tests/simulation"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

# As the build's, but for what nvcc would not say of a kernel. Device code may read vectors only
# where they are aligned: the host would not mind. (Jumps between stacks are no overflow.)
FLAGS = ["-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Wno-parentheses", "-Wno-psabi"]
FLAGS += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment", "-U_FORTIFY_SOURCE"]
FLAGS += [f"-I{SIMULATION / 'toolkit'}", f"-I{SIMULATION}", f"-I{CSRC}"]  # the first hides CUDA's

KERNELS = ["implicit_gemm_sm90", "implicit_gemm_weights_sm90", "implicit_gemm_exact_sm90"]
# The planner is part of plans.cpp.
HOST = [CSRC / f"cuda/implicit_gemm{part}.cpp" for part in ("", "_map", "_cost", "_cells")]
HOST += [CSRC / "problem.cpp"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def compile_with(*arguments: str | Path) -> None:
    done = run(*COMPILER, *FLAGS, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]


def translate(name: str, directory: Path) -> Path:
    """Makes C++ of a .cu file: of its launches and of the memory they are given."""
    text = (CSRC / f"cuda/{name}.cu").read_text()
    text = re.sub(r"(\w+)<<<(.*?)>>>\(", r"simulation::launch(\1, \2)(", text, flags=re.DOTALL)
    text = re.sub(
        r"extern __shared__ .*?(\w+) (\w+)\[\];", r"\1* const \2 = simulation::shared_memory;", text
    )
    path = directory / f"{name}.cpp"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled once."""
    if sys.platform != "linux":
        pytest.skip("threads are simulated by what Linux has for it (ucontext.h)")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler ({COMPILER[0]!r}): install one or set CXX")
    directory = tmp_path_factory.mktemp("simulation")
    (directory / "probe.cc").write_text("int main() { return int(_Float16(0)); }")
    probe = run(*COMPILER, *FLAGS, directory / "probe.cc", "-o", directory / "probe")
    if probe.returncode != 0:
        pytest.skip(f"{COMPILER[0]} lacks C++20, _Float16 or a sanitizer: {probe.stderr[-300:]}")

    # Kernels are compiled in less time with less effort; they take more of it than all the rest.
    jobs = [("-O1", translate(name, directory)) for name in KERNELS]
    jobs += [("-O3", source) for source in [*sorted(SIMULATION.glob("*.cpp")), *HOST]]
    objects = [directory / f"{source.stem}.o" for _, source in jobs]

    def compile_one(job: tuple[str, Path], to: Path) -> None:
        compile_with(job[0], "-c", job[1], "-o", to)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs, objects))
    compile_with(*objects, "-o", directory / "simulate")
    return directory / "simulate"


PLANS = 100  # of every theme
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
    **{"result_moved": 15},
}
THEMES = {
    "any": {"apart": 8},
    "patches": {"bulk_run_1": 4, "bulk_run_2": 4, "bulk_run_4": 1, "bulk_snug": 5},
    "boxes": {"boxed_snug": 6},
    "rows": {"cut_rows": 30, "boxed": 15},
    "kinds": {"source_kinds": 8, "overlap": 12},
    "images": {"lines_joined": 6, "lines_joined_straddling": 2, "straddling": 15},
}


@pytest.fixture(scope="session")
def simulated(simulator: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """What each theme's run said; all of them at once, as far as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda theme: run(simulator, theme, "1", str(PLANS)), THEMES)
        return dict(zip(THEMES, runs, strict=True))


def covered(done: subprocess.CompletedProcess[str]) -> Counter[str]:
    """Plans of each kind."""
    pairs = map(str.split, done.stdout.splitlines())
    return Counter({kind: int(count) for kind, count in pairs})


def assert_covered(counts: Counter[str], least: dict[str, int]) -> None:
    rare = {kind: counts[kind] for kind in least if counts[kind] < least[kind]}
    assert not rare, f"too few of {rare} in {dict(counts)}"


@pytest.mark.parametrize("theme", THEMES)
def test_every_result_is_right_and_stored_once(
    simulated: dict[str, subprocess.CompletedProcess[str]], theme: str
) -> None:
    done = simulated[theme]
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert_covered(covered(done), THEMES[theme])


def test_no_kind_of_plan_is_left_out(
    simulated: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    if any(done.returncode != 0 for done in simulated.values()):
        pytest.skip("a simulation failed")
    total = sum(map(covered, simulated.values()), Counter())
    print(dict(total))
    assert_covered(total, LEAST)
