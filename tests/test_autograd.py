"""Derivatives: of every order, backward and forward, of every op, and what they leave alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import conv_ops

ops = torch.ops.convops
IN_PYTHON = (
    os.environ.get("CONVOPS_AUTOGRAD") == "python"
)  # conv_ops/autograd.py instead of csrc/autograd.cpp

# Small enough for finite differences: input size, weight size, what else conv2d takes.
CASES = {
    "plain": ((2, 2, 4, 3), (3, 2, 3, 2), {}),
    "pointwise": ((2, 3, 2, 3), (2, 3, 1, 1), {}),
    "strided": ((1, 2, 6, 5), (2, 2, 3, 2), {"stride": (2, 3), "padding": (1, 0)}),
    "leftover": ((1, 1, 6, 6), (1, 1, 2, 2), {"stride": 3}),  # the stride skips the last column
    "dilated": ((1, 2, 5, 6), (2, 2, 2, 3), {"dilation": (3, 2), "padding": (0, 2)}),
    "grouped": ((2, 4, 3, 3), (6, 2, 2, 2), {"groups": 2, "padding": 1}),
    "depthwise": ((1, 3, 4, 4), (6, 1, 3, 3), {"groups": 3, "padding": 1}),
    "same": ((1, 2, 4, 5), (2, 2, 2, 4), {"padding": "same"}),
    "same_dilated": ((1, 2, 4, 5), (2, 2, 2, 3), {"padding": "same", "dilation": (3, 2)}),
    "unbatched": ((2, 4, 3), (3, 2, 3, 2), {"padding": 1}),
}

# The core ops on the "grouped" case, as functions of their tensors.
WINDOW = ([1], [1], [1], 2)
CORE_OPS = {
    "forward": (
        lambda x, w: ops.conv2d_forward(x, w, None, *WINDOW),
        ((2, 4, 3, 3), (6, 2, 2, 2)),
    ),
    "forward_asymmetric": (
        lambda x, w: ops.conv2d_forward(x, w, None, [2, 1], [0, 1, 2, 0], [1], 2),
        ((2, 4, 3, 3), (6, 2, 2, 2)),
    ),
    "backward_input": (
        lambda dy, w: ops.conv2d_backward_input(dy, w, [2, 4, 3, 3], *WINDOW),
        ((2, 6, 4, 4), (6, 2, 2, 2)),
    ),
    "backward_weight": (
        lambda dy, x: ops.conv2d_backward_weight(dy, x, [6, 2, 2, 2], [], *WINDOW),
        ((2, 6, 4, 4), (2, 4, 3, 3)),
    ),
    "im2col": (
        lambda x: ops.im2col(x, [2, 3], [2, 1], [1, 0], [1, 2]),
        ((2, 2, 4, 5),),
    ),
    "im2col_unbatched": (lambda x: ops.im2col(x, [2, 2]), ((2, 3, 3),)),
    "col2im": (
        lambda x: ops.col2im(x, [4, 5], [2, 3], [2, 1], [1, 0], [1, 2]),
        ((2, 12, 8),),
    ),
}


class Calls(TorchDispatchMode):
    """Records the core ops that run and the settings they run with."""

    def __init__(self):
        super().__init__()
        self.names, self.args, self.settings = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "convops":
            self.names.append(func._opname)
            self.args.append(args)
            self.settings.append(conv_ops.settings.get())
        return func(*args, **(kwargs or {}))


def randn(*size, device, dtype=torch.float64, requires_grad=True):
    return torch.randn(size, device=device, dtype=dtype, requires_grad=requires_grad)


def make(name, device, **kwargs):
    input_size, weight_size, options = CASES[name]
    tensors = [randn(*size, device=device, **kwargs) for size in (input_size, weight_size)]
    return [*tensors, randn(weight_size[0], device=device, **kwargs)], options


def make_core(name, device):
    function, sizes = CORE_OPS[name]
    return function, [randn(*size, device=device) for size in sizes]


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(device, name):
    tensors, options = make(name, device)
    assert torch.autograd.gradcheck(
        lambda x, w, b: conv_ops.conv2d(x, w, b, **options),
        tensors,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(device, name):
    tensors, options = make(name, device)
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: conv_ops.conv2d(x, w, b, **options),
        tensors,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("name", CORE_OPS)
def test_core_ops(device, name):
    function, tensors = make_core(name, device)
    assert torch.autograd.gradcheck(
        function, tensors, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True)


def test_gradcheck_of_strange_strides(device):
    def function(x, w):
        return conv_ops.conv2d(x.expand(2, 4, 4, 5), w.transpose(2, 3), groups=2)[:, ::2]

    tensors = (randn(2, 1, 4, 5, device=device), randn(4, 2, 2, 3, device=device))
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)


def third_derivatives(conv2d, tensors, options):
    y = conv2d(*tensors, **options)
    first = torch.autograd.grad(y.tanh().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.tanh().sum() for g in first), tensors, create_graph=True)
    return torch.autograd.grad(sum(g.tanh().sum() for g in second), tensors)


@pytest.mark.parametrize("name", ["strided", "grouped", "same_dilated", "unbatched"])
def test_third_order(device, name):
    tensors, options = make(name, device)
    ours = third_derivatives(conv_ops.conv2d, tensors, options)
    theirs = third_derivatives(F.conv2d, tensors, options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t], 3)[..., ::2].copy_(t),
    "offset": lambda t: torch.cat([t[:1], t])[1:],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", LAYOUTS)
def test_gradients_match_torch(device, input_layout, weight_layout, dtype):
    x = LAYOUTS[input_layout](torch.randn(2, 4, 5, 6, device=device, dtype=dtype))
    w = LAYOUTS[weight_layout](torch.randn(6, 2, 3, 3, device=device, dtype=dtype))
    b = torch.randn(6, device=device, dtype=dtype)
    tensors = [t.requires_grad_() for t in (x, w, b)]
    dy = torch.randn(2, 6, 3, 6, device=device, dtype=dtype)

    with conv_ops.settings.precision("ieee"):
        y = conv_ops.conv2d(*tensors, stride=(2, 1), padding=1, groups=2)
    gradients = torch.autograd.grad(y, tensors, dy)

    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = F.conv2d(*exact, stride=(2, 1), padding=1, groups=2)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs, tensor in zip(
        gradients, torch.autograd.grad(expected, exact, dy.double()), tensors, strict=True
    ):
        assert ours.dtype == dtype and ours.shape == tensor.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("weight_layout", LAYOUTS)
def test_weight_gradient_has_the_weights_strides(device, weight_layout):
    x = torch.randn(2, 4, 5, 6, device=device).to(memory_format=torch.channels_last)
    w = LAYOUTS[weight_layout](torch.randn(6, 4, 3, 3, device=device)).requires_grad_()
    (gradient,) = torch.autograd.grad(conv_ops.conv2d(x, w).sum(), w)
    dense = weight_layout != "sliced"
    assert gradient.stride() == (w.stride() if dense else w.contiguous().stride())


def test_expanded_weight(device):
    x = randn(2, 4, 5, 6, device=device)
    w = randn(1, 4, 3, 3, device=device)
    ours = torch.autograd.grad(conv_ops.conv2d(x, w.expand(3, 4, 3, 3)).tanh().sum(), (x, w))
    theirs = torch.autograd.grad(F.conv2d(x, w.expand(3, 4, 3, 3)).tanh().sum(), (x, w))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_needed_gradients_are_computed(device, needed):
    tensors, options = make("grouped", device)
    backward_ops = ["conv2d_backward_input", "conv2d_backward_weight"]
    expected = [backward_ops[i] for i in needed if i < 2]

    # Asked for by the engine's inputs, which a Python autograd function cannot see.
    y = conv_ops.conv2d(*tensors, **options)
    with Calls() as calls:
        torch.autograd.grad(y.sum(), [tensors[i] for i in needed])
    assert calls.names == (backward_ops if IN_PYTHON else expected)

    # Asked for by requires_grad.
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in needed)
    y = conv_ops.conv2d(*tensors, **options)
    with Calls() as calls:
        y.sum().backward()
    assert calls.names == expected
    assert [tensor.grad is not None for tensor in tensors] == [i in needed for i in range(3)]


@pytest.mark.parametrize(
    "needed, saved", [((0,), {1}), ((1,), {0}), ((2,), set()), ((0, 1), {0, 1})]
)
def test_only_needed_tensors_are_saved(device, needed, saved):
    tensors, options = make("grouped", device)
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in needed)
    packed = set()

    def pack(tensor):
        packed.update(i for i, t in enumerate(tensors) if t.data_ptr() == tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = conv_ops.conv2d(*tensors, **options)
    assert packed == saved
    y.sum().backward()


def test_nothing_is_recorded_without_need(device):
    tensors, options = make("grouped", device)
    with torch.no_grad():
        assert not conv_ops.conv2d(*tensors, **options).requires_grad
    with torch.inference_mode():
        y = conv_ops.conv2d(*tensors, **options)
    assert y.is_inference()
    assert not conv_ops.conv2d(*(t.detach() for t in tensors), **options).requires_grad


def test_graph_is_freed_and_kept(device):
    tensors, options = make("grouped", device)
    y = conv_ops.conv2d(*tensors, **options).sum()
    y.backward(retain_graph=True)
    first = [t.grad.clone() for t in tensors]
    y.backward()
    for tensor, gradient in zip(tensors, first, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_changed_operand_is_noticed(device):
    tensors, options = make("grouped", device)
    y = conv_ops.conv2d(*tensors, **options)
    with torch.no_grad():
        tensors[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_empty_batch(device):
    x, w, b = randn(0, 2, 5, 5, device=device), randn(3, 2, 3, 3, device=device), None
    conv_ops.conv2d(x, w, b).sum().backward()
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape and not w.grad.any()


def forward_derivative(conv2d, tensors, tangents, options):
    with fwad.dual_level():
        duals = [
            tensor if tangent is None else fwad.make_dual(tensor, tangent)
            for tensor, tangent in zip(tensors, tangents, strict=True)
        ]
        return fwad.unpack_dual(conv2d(*duals, **options)).tangent


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("name", ["strided", "same", "unbatched"])
def test_forward_mode(device, name, which):
    tensors, options = make(name, device)
    tangents = [torch.randn_like(t) if i in which else None for i, t in enumerate(tensors)]
    ours = forward_derivative(conv_ops.conv2d, tensors, tangents, options)
    theirs = forward_derivative(F.conv2d, tensors, tangents, options)
    torch.testing.assert_close(ours, theirs)
    if ours.requires_grad:  # backward through forward
        for a, b in zip(
            *(
                torch.autograd.grad(t.tanh().sum(), tensors, materialize_grads=True)
                for t in (ours, theirs)
            ),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CORE_OPS)
def test_forward_mode_of_core_ops(device, name):
    """Bilinear: the tangent for all tangents equal to the operands is the number of operands."""
    function, tensors = make_core(name, device)
    with fwad.dual_level():
        result = fwad.unpack_dual(function(*(fwad.make_dual(t, t.detach()) for t in tensors)))
    torch.testing.assert_close(result.tangent, len(tensors) * result.primal)


def test_backward_keeps_the_settings_of_the_forward(device):
    tensors, options = make("grouped", device)
    with (
        conv_ops.settings.algorithm("direct"),
        conv_ops.settings.precision("ieee"),
        conv_ops.settings.workspace_limit(12345678),
    ):
        y = conv_ops.conv2d(*tensors, **options)
    with conv_ops.settings.algorithm("im2col_gemm"), Calls() as calls:
        y.sum().backward()
    assert calls.names == ["conv2d_backward_input", "conv2d_backward_weight"]
    assert [args[-2:] for args in calls.args] == [("ieee", "direct")] * 2
    assert [settings.workspace_limit for settings in calls.settings] == [12345678] * 2
    assert conv_ops.settings.get().workspace_limit != 12345678


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_precision_follows_torch(device, allow_tf32):
    x = torch.randn(2, 16, 12, 12, device=device, requires_grad=True)
    w = torch.randn(32, 16, 3, 3, device=device, requires_grad=True)

    def run(**choice):
        y = conv_ops.conv2d(x, w, **choice)
        return y, *torch.autograd.grad(y.square().sum(), (x, w))

    with torch.backends.cudnn.flags(allow_tf32=allow_tf32):
        actual = run()
    for a, b in zip(actual, run(precision="tf32" if allow_tf32 else "ieee"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(IN_PYTHON, reason="this is the inner run")
def test_python_fallback():
    """The same tests where no C++ autograd library was built for the torch at hand."""
    files = [f"test_{name}.py" for name in ("autograd", "functorch", "autocast")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=Path(__file__).parent,
        env={**os.environ, "CONVOPS_AUTOGRAD": "python"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
