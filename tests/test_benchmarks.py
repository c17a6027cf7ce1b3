"""The benchmark program: it measures, it notices wrong results, its rows can be repeated."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from problems import SMALL

ROOT = Path(__file__).parent.parent
PROBLEM = SMALL[0].name
QUICK = ["--seconds", "0", "--rounds", "2", "--elements", "4096", "--device", "cpu"]


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "benchmarks"]
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def result(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    layouts = ["--layout", "nchw", "channels_last"]
    algorithms = ["--algorithm", "plan", "im2col_gemm", "none_such"]
    done = run("--problem", PROBLEM, *layouts, *algorithms, *QUICK, "--output", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_direction_layout_and_algorithm_has_a_row(measured: Path) -> None:
    rows = result(measured)["rows"]
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        assert row["problem"] == PROBLEM
        if row["algorithm"] == "none_such":
            assert row["status"] == "refused"
            assert "im2col_gemm" in row["note"]
            continue
        assert row["status"] == "ok", row
        assert row["chosen"]
        ours, theirs = row["times"]["conv_ops"], row["times"]["PyTorch default"]
        for times in (ours, theirs):
            assert 0 < times["min_ms"] <= times["median_ms"] <= times["max_ms"]
            assert times["rounds"] == 2
        assert math.isclose(row["ratio"], theirs["median_ms"] / ours["median_ms"])
        assert math.isclose(row["fraction"], row["floor_ms"] / ours["median_ms"])
        assert 0 < row["errors"]["conv_ops"] <= row["error_bound"] < 1e-5


def test_results_say_where_they_come_from(measured: Path) -> None:
    content = result(measured)
    machine = content["machine"]
    assert machine["date"] and machine["commit"] and machine["device"]
    assert machine["versions"]["torch"] and machine["versions"]["conv_ops"]
    assert content["ceilings"]["bandwidth"] > 0
    assert content["ceilings"]["rates"]["ieee"] > 0
    assert [path.suffix for path in sorted(measured.iterdir())] == [".json", ".md", ".png"]


def test_a_row_can_be_repeated(measured: Path, tmp_path: Path) -> None:
    row = result(measured)["rows"][-2]
    python, *command = shlex.split(row["command"])
    assert python == "python"
    subprocess.run(
        [sys.executable, *command, *QUICK, "--output", str(tmp_path)], cwd=ROOT, check=True
    )
    (again,) = result(tmp_path)["rows"]
    for key in ("problem", "shape", "direction", "precision", "layout", "algorithm"):
        assert again[key] == row[key]


def test_a_wrong_result_is_not_timed_and_fails_the_run(tmp_path: Path) -> None:
    nothing_is_right = (
        "import sys, benchmarks; sys.path.append(sys.path.pop(0))\n"
        "from benchmarks import cli, reference\n"
        "reference.bound = lambda case: 0.0\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    options = ["--problem", PROBLEM, "--direction", "forward", *QUICK, "--output", str(tmp_path)]
    done = run(*options, code=nothing_is_right)
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = result(tmp_path)["rows"]
    assert row["status"] == "wrong"
    assert not row["times"]


def test_unfold(tmp_path: Path) -> None:
    options = ["--problem", "seeds", *QUICK, "--output", str(tmp_path)]
    done = run("unfold", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in result(tmp_path)["rows"]:
        assert row["direction"] == "forward"
        assert "unfold + matmul" in row["times"]


def test_overhead(tmp_path: Path) -> None:
    options = ["--rounds", "1", "--calls", "2", "--device", "cpu", "--output", str(tmp_path)]
    done = run("overhead", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = result(tmp_path)["rows"]
    assert len(rows) == 4 * 5
    assert all(row["median_us"] > 0 and row["ratio"] > 0 for row in rows)


NETWORK = "--network unet --size 32 --batch 2 --seconds 0 --rounds 1 --device cpu".split()


def test_networks(tmp_path: Path) -> None:
    options = ["--precision", "ieee", "bf16", "--layout", "channels_last", "--layers", "all"]
    done = run("networks", *NETWORK, *options, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = result(tmp_path)["rows"]
    assert len(rows) == 2 * 2  # work, precision
    for row in rows:
        ours, theirs = row["times"]["conv_ops"], row["times"]["PyTorch default"]
        assert math.isclose(row["ratio"], theirs["median_ms"] / ours["median_ms"])
        training = row["work"] == "training"
        assert list(row["bounds"]) == ["output", "gradients"][: 1 + training]
        for what, bound in row["bounds"].items():
            assert 0 < row["errors"]["conv_ops"][what] <= bound
            assert bound < (1e-4 if row["precision"] == "ieee" else 0.5)
        for part in ["forward", "backward"][: 1 + training]:
            layers = [layer for layer in row["layers"] if layer["part"] == part]
            assert sum(len(layer["modules"]) for layer in layers) == row["convolutions"] == 19
            for layer in layers:
                assert layer["algorithms"] and layer["ours_ms"] > 0 and layer["theirs_ms"] > 0
        losses = [layer["ours_ms"] - layer["theirs_ms"] for layer in row["layers"]]
        assert losses == sorted(losses, reverse=True)
    (table,) = tmp_path.glob("*.md")
    written = table.read_text()
    table.unlink()
    assert run("report", str(next(tmp_path.glob("*.json")))).returncode == 0
    assert table.read_text() == written


def test_a_network_that_computes_something_else_is_wrong(tmp_path: Path) -> None:
    one_gradient_is_doubled = (
        "import sys, benchmarks; sys.path.append(sys.path.pop(0))\n"
        "import conv_ops\n"
        "convert = conv_ops.convert_conv2d\n"
        "def doubled(model):\n"
        "    convert(model).last.weight.register_hook(lambda gradient: 2 * gradient)\n"
        "conv_ops.convert_conv2d = doubled\n"
        "from benchmarks import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    options = ["--work", "training", "--precision", "ieee", "--layout", "nchw"]
    command = [*NETWORK, *options, "--output", str(tmp_path)]
    done = run("networks", *command, code=one_gradient_is_doubled)
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = result(tmp_path)["rows"]
    assert row["status"] == "wrong"
    assert not row["times"]


def test_an_unknown_problem_is_a_usage_error() -> None:
    done = run("--problem", "no-such-problem")
    assert done.returncode == 2
    assert "no-such-problem" in done.stderr
