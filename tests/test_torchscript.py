"""TorchScript: script, trace, save, load, forward and backward; and without Python in C++."""

import importlib.util
import io
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import conv_ops

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

EXAMPLE = Path(__file__).parents[1] / "examples" / "cpp"


@pytest.fixture(autouse=True)
def ieee():
    """Rounding to TF32 would blow up what fused pointwise ops change in the last bit."""
    with conv_ops.settings.precision("ieee"):
        yield


@torch.jit.script
def scripted(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y = torch.ops.convops.conv2d(x, w, b, [2, 1], [1, 0], [1, 1], 2)
    z = torch.ops.convops.conv2d(y, w[:, :1], None, 1, "same", 1, 6)
    columns = torch.ops.convops.im2col(z, [2, 2])
    return torch.ops.convops.col2im(columns, [z.size(2), z.size(3)], [2, 2])


def eager(x, w, b):
    y = conv_ops.conv2d(x, w, b, (2, 1), (1, 0), 1, 2)
    z = conv_ops.conv2d(y, w[:, :1], padding="same", groups=6)
    return conv_ops.col2im(conv_ops.im2col(z, 2), z.shape[2:], 2)


def sample(device):
    torch.manual_seed(0)
    sizes = ((2, 4, 6, 5), (6, 2, 3, 3), (6,))
    return [torch.randn(s, device=device, requires_grad=True) for s in sizes]


def model(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        conv_ops.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        conv_ops.Conv2d(8, 8, (2, 4), padding="same", groups=4, bias=False),
        conv_ops.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
        conv_ops.Conv2d(4, 4, 3, padding=1, precision="ieee", algorithm="direct"),
    ).to(device)


def saved_and_loaded(program):
    buffer = io.BytesIO()
    torch.jit.save(program, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def gradients(function, inputs, parameters=()):
    y = function(*inputs)
    return y, torch.autograd.grad(y.square().mean(), [*inputs, *parameters])


@pytest.mark.parametrize("load", [lambda program: program, saved_and_loaded])
def test_function(device, load):
    function, inputs = load(scripted), sample(device)
    for _ in range(3):  # the profiling executor optimizes after two runs
        torch.testing.assert_close(gradients(function, inputs), gradients(eager, inputs))


@pytest.mark.parametrize("make", [torch.jit.script, "trace"])
@pytest.mark.parametrize("load", [lambda program: program, saved_and_loaded])
def test_model(device, make, load):
    net = model(device)
    x = torch.randn(2, 3, 10, 12, device=device, requires_grad=True)
    program = torch.jit.trace(net, x) if make == "trace" else make(net)
    program = load(program)
    for size in ((2, 3, 10, 12), (1, 3, 7, 16)):
        x = torch.randn(size, device=device, requires_grad=True)
        for _ in range(3):
            torch.testing.assert_close(
                gradients(program, [x], program.parameters()),
                gradients(net, [x], net.parameters()),
            )


def test_frozen_model(device):
    net = model(device).eval()
    x = torch.randn(2, 3, 10, 12, device=device)
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.script(net))
        torch.testing.assert_close(frozen(x), net(x))


def test_program_moves_between_dtypes(device):
    program = saved_and_loaded(torch.jit.script(model(device))).to(torch.float64)
    x = torch.randn(2, 3, 10, 12, device=device, dtype=torch.float64)
    torch.testing.assert_close(program(x), model(device).double()(x))


@pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which(os.environ.get("CXX", "c++"))),
    reason="needs cmake and a C++ compiler",
)
def test_program_runs_without_python(tmp_path):
    def run(*command):
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run("cmake", "-S", EXAMPLE, "-B", tmp_path, f"-DTORCH_DIR={torch.__path__[0]}")
    run("cmake", "--build", tmp_path)

    spec = importlib.util.spec_from_file_location("save_program", EXAMPLE / "save_program.py")
    save_program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(save_program)
    arguments = save_program.save(tmp_path)
    if not Path(arguments[-1]).exists():
        pytest.skip(f"no C++ autograd library for torch {torch.__version__}")
    assert "as in Python" in run(tmp_path / "convops_example", *arguments)
