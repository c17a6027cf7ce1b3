"""``python -m conv_ops`` tells about the installation, and fails where results are wrong."""

import os
import subprocess
import sys

import pytest
import torch

import conv_ops
from conv_ops import __main__ as program


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program in this process; returns its exit code and what it printed."""

    def call():
        monkeypatch.setattr(sys, "argv", ["conv_ops"])
        code = program.main()
        return code, capsys.readouterr().out

    return call


def test_report(run):
    code, output = run()
    assert code == 0 and "FAILED" not in output
    assert f"conv_ops {conv_ops.__version__}" in output and f"torch {torch.__version__}" in output
    for library in conv_ops.libraries:
        assert f"{library.name} {'loaded' if library.loaded else 'not loaded'}" in output
        assert library.note in output
    for index in range(torch.cuda.device_count()):
        assert f"cuda:{index}: {torch.cuda.get_device_name(index)}" in output
    for name in ("precision", "algorithm", "workspace_limit", "autotune"):
        assert f"  {name}: {getattr(conv_ops.settings.get(), name)}" in output
    for entry in conv_ops._C.algorithms():
        device = {"cpu": "cpu", "cuda": "cuda:0"}[entry["device"]]
        for dtype in ("float32", "float64", "float16", "bfloat16"):
            if device == "cpu" or torch.cuda.is_available():
                assert f"  {device} {entry['name']} {dtype} " in output


def checked(output: str) -> list[str]:
    """The lines of the self-check that are about a case."""
    lines = output[output.index("self-check") :].splitlines()[1:]
    return [line for line in lines if "takes none" not in line]


@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_wrong_result_is_noticed(run, monkeypatch, wrong):
    right = conv_ops.conv2d

    def spoilt(input, *arguments, **options):
        output = right(input, *arguments, **options)
        return output + wrong if input.dtype == torch.float64 else output

    monkeypatch.setattr(conv_ops, "conv2d", spoilt)
    code, output = run()
    lines = checked(output)
    assert code == 1
    assert all(("FAILED" in line) == ("float64" in line) for line in lines)


def test_wrong_gradient_is_noticed(run, monkeypatch):
    right = conv_ops.conv2d

    def spoilt(input, weight, *arguments, **options):  # the weight's gradient is zero
        return right(input, weight.detach() + 0 * weight, *arguments, **options)

    monkeypatch.setattr(conv_ops, "conv2d", spoilt)
    code, output = run()
    assert code == 1 and "FAILED" in output


def test_error_is_reported_and_the_report_goes_on(run, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(conv_ops, "conv2d", broken)
    code, output = run()
    lines = checked(output)
    assert code == 1 and len(lines) >= 8
    assert all("FAILED: no kernel image is available" in line for line in lines)


@pytest.mark.parametrize("autograd", ["", "python"])
def test_as_a_program(tmp_path, autograd):
    """With the C++ library for this torch, if there is one, and with the Python fall-back."""
    result = subprocess.run(
        [sys.executable, "-m", "conv_ops"],
        env={**os.environ, "CONVOPS_AUTOGRAD": autograd},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ok, relative error" in result.stdout and not result.stderr
    if autograd:
        assert "conv_ops.autograd loaded" in result.stdout
