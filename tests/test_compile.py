"""torch.library.opcheck, torch.compile, torch.export and AOTInductor."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import conv_ops

ops = torch.ops.convops
WINDOW = ([2, 1], [1, 0, 2, 1], [1, 2], 2)  # stride, padding, dilation, groups


@pytest.fixture(autouse=True)
def ieee():
    """Rounding to TF32 would blow up what fused pointwise ops change in the last bit."""
    torch.compiler.reset()
    with conv_ops.settings.precision("ieee"):
        yield


def randn(*size, device, dtype=torch.float32, channels_last=False, requires_grad=True):
    tensor = torch.randn(size, device=device, dtype=dtype)
    if channels_last:
        tensor = tensor.to(memory_format=torch.channels_last)
    return tensor.requires_grad_(requires_grad)


def op_arguments(device, **kwargs):
    """Every op with arguments to call it with."""
    x = randn(2, 4, 6, 7, device=device, **kwargs)
    w = randn(6, 2, 3, 3, device=device, **kwargs)
    b = randn(6, device=device, dtype=x.dtype)
    y = randn(2, 6, 3, 6, device=device, **kwargs)
    columns = randn(2, 24, 15, device=device, dtype=x.dtype)
    return {
        "conv2d": (ops.conv2d.default, (x, w, b, [2, 1], [1, 1], [1, 1], 2)),
        "conv2d_defaults": (ops.conv2d.default, (x[:, :2], w)),
        "conv2d_unbatched": (ops.conv2d.default, (x[0], w, b, [2, 1], [1, 1], [1, 1], 2)),
        "conv2d_same": (ops.conv2d.padding, (x, w, b, [1, 1], "same", [1, 2], 2)),
        "forward": (ops.conv2d_forward.default, (x, w, b, *WINDOW)),
        "forward_no_bias": (ops.conv2d_forward.default, (x, w, None, *WINDOW, "ieee", "direct")),
        "backward_input": (ops.conv2d_backward_input.default, (y, w, x.shape, *WINDOW)),
        "backward_weight": (
            ops.conv2d_backward_weight.default,
            (y, x, w.shape, w.stride(), *WINDOW),
        ),
        "backward_weight_contiguous": (
            ops.conv2d_backward_weight.default,
            (y, x, w.shape, [], *WINDOW),
        ),
        "im2col": (ops.im2col.default, (x, [3, 2], [1, 1], [0, 1], [2, 1])),
        "im2col_unbatched": (ops.im2col.default, (x[0], [3, 2])),
        "col2im": (ops.col2im.default, (columns, [5, 6], [3, 2], [1, 1], [0, 0], [1, 1])),
    }


NAMES = list(op_arguments("cpu"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(device, name, channels_last):
    op, args = op_arguments(device, channels_last=channels_last)[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_are_exact(device, name, channels_last, dtype, mode):
    op, args = op_arguments(device, dtype=dtype, channels_last=channels_last)[name]
    with mode():
        real = op(*args)
        with FakeTensorMode() as fakes:
            fake_args = [fakes.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = op(*fake_args)
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (
        real.shape,
        real.stride(),
        real.dtype,
        real.device,
    )


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors(name):
    op, args = op_arguments("cpu")[name]
    meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    real = op(*args)
    assert meta.is_meta and (meta.shape, meta.stride()) == (real.shape, real.stride())


# Calls of F.conv2d that it refuses: input, weight, the rest of the arguments.
REFUSED = {
    "channels": ((1, 3, 5, 5), (2, 4, 3, 3), {}),
    "groups": ((1, 4, 5, 5), (3, 2, 3, 3), {"groups": 2}),
    "no groups": ((1, 4, 5, 5), (4, 4, 3, 3), {"groups": 0}),
    "kernel too large": ((1, 4, 5, 5), (4, 4, 3, 6), {}),
    "padding": ((1, 4, 5, 5), (4, 4, 3, 3), {"padding": -1}),
    "stride": ((1, 4, 5, 5), (4, 4, 3, 3), {"stride": 0}),
    "dilation": ((1, 4, 5, 5), (4, 4, 3, 3), {"dilation": (1, 0)}),
    "strided same": ((1, 4, 5, 5), (4, 4, 3, 3), {"padding": "same", "stride": 2}),
    "word": ((1, 4, 5, 5), (4, 4, 3, 3), {"padding": "full"}),
    "four sides": ((1, 4, 5, 5), (4, 4, 3, 3), {"padding": (1, 1, 1, 1)}),
    "dimensions of input": ((4, 5), (4, 4, 3, 3), {}),
    "dimensions of weight": ((1, 4, 5, 5), (4, 4, 3), {}),
    "bias": ((1, 4, 5, 5), (4, 4, 3, 3), {"bias": torch.ones(3)}),
    "dtype": ((1, 4, 5, 5), (4, 4, 3, 3), {"bias": torch.ones(4, dtype=torch.float64)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fake_tensors_refuse_what_kernels_refuse(name):
    input_size, weight_size, options = REFUSED[name]
    for conv2d in (F.conv2d, conv_ops.conv2d):
        with pytest.raises(RuntimeError):
            conv2d(torch.ones(input_size), torch.ones(weight_size), **options)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError):
        conv_ops.conv2d(torch.ones(input_size), torch.ones(weight_size), **options)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = conv_ops.Conv2d(3, 8, 3, padding=1, stride=2)
        self.second = conv_ops.Conv2d(8, 8, 3, padding="same", groups=4, bias=False)
        self.third = conv_ops.Conv2d(8, 4, 1, padding=1, padding_mode="reflect")

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()).relu()).sigmoid()


def run(function, model, x):
    """The output, and the gradients of input and parameters."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y.square().mean(), [x, *model.parameters()])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compile(device, backend, dynamic):
    model = Net().to(device)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for size in [(2, 3, 16, 12), (3, 3, 14, 18), (7, 3, 9, 31)][: 3 if dynamic else 1]:
        x = torch.randn(size, device=device)
        torch.testing.assert_close(run(compiled, model, x), run(model, model, x))


def test_compile_channels_last(device):
    model = Net().to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 12, device=device).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual, expected = run(compiled, model, x), run(model, model, x)
    torch.testing.assert_close(actual, expected, check_stride=True)


def test_compile_keeps_precision_and_algorithm(device):
    seen = []

    def record(graph, inputs):
        seen.extend(n.args for n in graph.graph.nodes if n.target is ops.conv2d_forward.default)
        return graph

    model = conv_ops.Conv2d(3, 4, 3, precision="ieee", algorithm="direct", device=device)
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=record), fullgraph=True)
    compiled(torch.randn(1, 3, 5, 5, device=device, requires_grad=True))
    assert [args[-2:] for args in seen] == [("ieee", "direct")]


def export(model, device):
    batch = torch.export.Dim("batch", min=1, max=64)
    example = torch.randn(4, 3, 16, 12, device=device)
    return torch.export.export(model, (example,), dynamic_shapes={"x": {0: batch}})


@pytest.mark.parametrize("decompose", [False, True])
def test_export_with_dynamic_batch(device, decompose, tmp_path):
    model = Net().to(device).eval()
    program = export(model, device)
    if decompose:
        program = program.run_decompositions()
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 16, 12, device=device)
        torch.testing.assert_close(loaded(x), model(x))


AOT_INDUCTOR = """
import sys, torch
model, x = torch.nn.ReLU().to(sys.argv[1]), torch.randn(2, 3, device=sys.argv[1])
program = torch.export.export(model, (x,))
path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[2])
torch._inductor.aoti_load_package(path)(x)
"""


def test_aot_inductor(device, tmp_path):
    # Loading any package, a ReLU's too, crashes the process in some installations of torch 2.11.
    plain = [sys.executable, "-c", AOT_INDUCTOR, device, str(tmp_path / "relu.pt2")]
    if subprocess.run(plain, capture_output=True).returncode < 0:
        pytest.skip("torch's own AOTInductor crashes here without conv_ops")
    model = Net().to(device).eval()
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            export(model, device), package_path=str(tmp_path / "net.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for batch in (1, 5):
            x = torch.randn(batch, 3, 16, 12, device=device)
            torch.testing.assert_close(loaded(x), model(x))
