"""conv_ops.explain tells what the plan would do."""

import pytest
import torch

import conv_ops
from conv_ops import settings


def operands(device, *sizes, **options):
    return [torch.randn(each, device=device, **options) for each in sizes]


@pytest.mark.parametrize("direction", ["forward", "backward_input", "backward_weight"])
def test_prints_what_it_returns(device, direction, capsys):
    x, w, b = operands(device, (2, 4, 9, 8), (6, 2, 3, 3), (6,))
    found = conv_ops.explain(x, w, b, 2, 1, 1, 2, direction=direction)
    assert capsys.readouterr().out == f"{found}\n"
    assert found.problem.startswith(direction)
    assert "2x4x9x8" in found.problem and "6x2x3x3" in found.problem
    assert found.device and found.device in str(found)

    names = [each["name"] for each in conv_ops._C.algorithms() if each["device"] == device]
    assert [each.algorithm for each in found.candidates] == names
    assert sum(each.chosen for each in found.candidates) == 1 and found.chosen.can_run
    for each in found.candidates:
        assert each.algorithm in str(found) and each.reason in str(found)
        assert (each.predicted_ms is not None) == each.can_run
        assert each.measured_ms is None
    (line,) = [line for line in str(found).splitlines() if line.startswith(">")]
    assert found.chosen.algorithm in line


def test_table():
    candidates = (
        conv_ops.Candidate("fast", "needs a GPU of capability 9.0", None, None, None, False),
        conv_ops.Candidate("good", "", 1.23456, 0.5, 3 * 2**20, True),
        conv_ops.Candidate("slow", "", 1234.0, None, 100, False),
    )
    found = conv_ops.Explanation("problem", "device", candidates)
    assert str(found) == (
        "problem on device\n"
        "  algorithm  predicted  measured  workspace\n"
        "  fast               -         -          -  cannot run: needs a GPU of capability 9.0\n"
        "> good        1.235 ms    0.5 ms    3.0 MiB\n"
        "  slow         1234 ms         -      100 B"
    )
    assert found.chosen is candidates[1]
    assert conv_ops.Explanation("problem", "device", candidates[:1]).chosen is None


def test_same_padding_unbatched_and_layouts(device):
    x, w = operands(device, (4, 9, 8), (6, 4, 2, 4))
    problem = conv_ops.explain(x, w, padding="same").problem
    assert problem == conv_ops.explain(x[None], w, padding="same").problem
    assert "output 9x8" in problem
    assert problem != conv_ops.explain(x, w, padding=1).problem
    last = x[None].to(memory_format=torch.channels_last)
    assert problem != conv_ops.explain(last, w, padding="same").problem


def test_nothing_is_computed(device):
    """A problem of 4 TiB, as views of one number."""
    x = torch.zeros(1, device=device).expand(2**10, 2**10, 2**10, 2**10)
    w = torch.zeros(1, device=device).expand(2, 2**10, 3, 3)
    assert conv_ops.explain(x, w).problem


def test_measured_after_tuning(device, tmp_path, monkeypatch):
    monkeypatch.setenv("CONVOPS_CACHE_DIR", str(tmp_path))
    x, w = operands(device, (1, 4, 9, 8), (6, 4, 3, 3))
    with settings.autotune(True):
        conv_ops.conv2d(x, w)
    found = conv_ops.explain(x, w)
    times = [each.measured_ms for each in found.candidates if each.can_run]
    conv_ops.tuning.clear()
    assert None not in times and found.chosen.measured_ms == min(times) > 0
    assert conv_ops.explain(x, w).chosen.measured_ms is None


def test_precision(device):
    x, w = operands(device, (1, 4, 9, 8), (6, 4, 3, 3))
    problems = {each: conv_ops.explain(x, w, precision=each).problem for each in ("ieee", "tf32")}
    with settings.precision("tf32"):
        assert conv_ops.explain(x, w).problem == problems["tf32"]
    if device == "cpu":
        assert problems["tf32"] == problems["ieee"]  # a CPU has no TF32
    else:
        assert "tf32" in problems["tf32"] and "ieee" in problems["ieee"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"direction": "sideways"}, ValueError, "but got 'sideways'"),
        ({"precision": "fp8"}, ValueError, "but got 'fp8'"),
        ({"stride": 0}, RuntimeError, "non-positive stride"),
        ({"groups": 3}, RuntimeError, "Given groups=3"),
        ({"padding": (1, 1, 1, 1)}, RuntimeError, r"padding=\[1, 1, 1, 1\]"),
        ({"padding": "same", "stride": 2}, RuntimeError, "padding='same'"),
    ],
)
def test_refuses(arguments, error, message, capsys):
    x, w = operands("cpu", (1, 4, 9, 8), (6, 4, 3, 3))
    with pytest.raises(error, match=message):
        conv_ops.explain(x, w, **arguments)
    assert capsys.readouterr().out == ""


def test_refuses_what_no_kernel_takes():
    x, w = operands("cpu", (1, 4, 9, 8), (6, 4, 3, 3))
    with pytest.raises(ValueError, match="int64"):
        conv_ops.explain(x.long(), w)
    with pytest.raises(ValueError, match="meta"):
        conv_ops.explain(x.to("meta"), w)
