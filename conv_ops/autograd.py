"""Derivatives and autocast of the ops, for a torch without the C++ autograd library.

The same formulas as csrc/autograd.cpp, which says more about them: derivatives of every order,
forward-mode AD and ``torch.func``, at a higher cost per call on the host.
``CONVOPS_AUTOGRAD=python`` in the environment chooses this way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# These run inside dispatcher kernels, where torch.func has already come down to one of its levels.
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from conv_ops.functional import conv2d_with, explicit_padding

_ops = torch.ops.convops
_library = torch.library.Library("convops", "IMPL")


def register() -> None:
    """Registers what the C++ autograd library registers."""
    for name, kernel in {
        "conv2d_forward": _conv2d_forward,
        "conv2d_backward_input": _conv2d_backward_input,
        "conv2d_backward_weight": _conv2d_backward_weight,
        "im2col": _im2col,
        "col2im": _col2im,
    }.items():
        _library.impl(name, kernel, "Autograd", with_keyset=True)
    for key in ("Autograd", "AutocastCPU", "AutocastCUDA", "FuncTorchBatched"):
        _library.impl("conv2d", _conv2d, key)
        _library.impl("conv2d.padding", _conv2d, key)
    for device in ("CPU", "CUDA"):
        _library.impl("conv2d_forward", _autocast(device.lower()), f"Autocast{device}")


class _Multilinear(_SingleLevelFunction):
    """An op of one or two operands and perhaps a bias, linear in each of them.

    `below` computes it below autograd, `call` is the op for tangents in an operand's place, and
    `gradient(i, grad, other)` is the gradient of the operand that is not `other`.
    """

    @staticmethod
    def forward(ctx, a, b, bias, below, call, gradient):
        needs_a, needs_b = ctx.needs_input_grad[:2]
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.gradient, ctx.settings = call, gradient, _C().get_settings("thread")
        output = below()
        ctx.output_size = output.shape
        return output

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 6
        a, b = ctx.saved_tensors
        needs_a, needs_b, needs_bias = ctx.needs_input_grad[:3]
        with _thread_settings(ctx.settings):
            return (
                ctx.gradient(0, grad, b) if needs_a else None,
                ctx.gradient(1, grad, a) if needs_b else None,
                grad.sum((0, 2, 3)) if needs_bias else None,
                *(None,) * 3,
            )

    @staticmethod
    def jvp(ctx, a_tangent, b_tangent, bias_tangent, *_):
        a, b = ctx.saved_tensors
        terms = []
        if a_tangent is not None:
            terms.append(ctx.call(a_tangent, b))
        if b_tangent is not None:
            terms.append(ctx.call(a, b_tangent))
        if bias_tangent is not None:
            terms.append(bias_tangent.view(1, -1, 1, 1).expand(ctx.output_size))
        return sum(terms[1:], terms[0])


def _differentiable(a, b, bias, below, call, gradient) -> Tensor:
    with enable_single_level_autograd_function():
        return _Multilinear.apply(a, b, bias, below, call, gradient)


def _below_autograd(op, keyset, *args) -> Callable[[], Tensor]:
    """A call of the op's next kernel.

    That may be this module's at torch.func's next level, which needs the modes of now, not the
    disabled ones of a Function's forward.
    """
    grad_mode, forward_mode = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    def below():
        with (
            torch._C._AutoDispatchBelowAutograd(),
            torch.set_grad_enabled(grad_mode),
            _set_fwd_grad_enabled(forward_mode),
        ):
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return below


@contextmanager
def _thread_settings(values: dict[str, Any]) -> Iterator[None]:
    """The settings of the forward's thread, in the thread that the backward runs on."""
    saved = _C().get_settings("thread")
    _C().set_settings("thread", values)
    try:
        yield
    finally:
        _C().set_settings("thread", saved)


def _C():
    """The compiled module, which is imported after this one."""
    from conv_ops import _C

    return _C


# ---- The convolution ops -------------------------------------------------------------------

# The roles of the two operands of each op in order, by the role of its result.
_OPERANDS = {
    "output": ("input", "weight"),
    "input": ("output", "weight"),
    "weight": ("output", "input"),
}
_OPS = {
    "output": _ops.conv2d_forward.default,
    "input": _ops.conv2d_backward_input.default,
    "weight": _ops.conv2d_backward_weight.default,
}


def _conv(keyset, role: str, a, b, bias, layout: tuple, window: tuple) -> Tensor:
    """The op whose result has that role.

    `layout` is what the op takes between its operands and the window (the bias, or the result's
    size and strides), `window` all that follows.
    """
    layouts = tuple(map(_gradient_layout, _OPERANDS[role], (a, b)))
    below = _below_autograd(_OPS[role], keyset, a, b, *layout, *window)

    def call(a, b):
        return _OPS[role](a, b, *((None,) if role == "output" else layout), *window)

    def gradient(i, grad, other):
        wanted = _OPERANDS[role][i]
        operands = (grad, other) if _OPERANDS[wanted][0] == role else (other, grad)
        return _OPS[wanted](*operands, *layouts[i], *window)

    return _differentiable(a, b, bias, below, call, gradient)


def _gradient_layout(role: str, tensor: Tensor) -> tuple:
    """What the op of that role takes between operands and window to make the tensor's gradient."""
    if role == "output":
        return (None,)
    if role == "input":
        return (tensor.shape,)
    # A gradient has its weight's strides, unless those could not be written to.
    return tensor.shape, tensor.stride() if _is_dense(tensor) else ()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory, each in a place of its own."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _conv2d_forward(
    keyset, input, weight, bias, stride, padding, dilation, groups, precision=None, algorithm=None
):
    window = (stride, padding, dilation, groups, precision, algorithm)
    return _conv(keyset, "output", input, weight, bias, (bias,), window)


def _conv2d_backward_input(keyset, grad_output, weight, input_size, *window):
    return _conv(keyset, "input", grad_output, weight, None, (input_size,), window)


def _conv2d_backward_weight(keyset, grad_output, input, weight_size, weight_stride, *window):
    layout = (weight_size, weight_stride)
    return _conv(keyset, "weight", grad_output, input, None, layout, window)


# ---- im2col and col2im: each the other's gradient ------------------------------------------


def _im2col(keyset, input, *window):
    image_size = input.shape[-2:]
    return _differentiable(
        input,
        None,
        None,
        below=_below_autograd(_ops.im2col.default, keyset, input, *window),
        call=lambda tangent, _: _ops.im2col(tangent, *window),
        gradient=lambda i, grad, _: _ops.col2im(grad, image_size, *window),
    )


def _col2im(keyset, input, output_size, *window):
    return _differentiable(
        input,
        None,
        None,
        below=_below_autograd(_ops.col2im.default, keyset, input, output_size, *window),
        call=lambda tangent, _: _ops.col2im(tangent, output_size, *window),
        gradient=lambda i, grad, _: _ops.im2col(grad, *window),
    )


# ---- The public op, autocast ---------------------------------------------------------------


def _conv2d(input, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Both overloads of conv2d become conv2d_forward, which alone has derivatives and autocast."""
    settings = _C().get_settings("thread")
    return conv2d_with(
        input,
        weight,
        bias,
        stride,
        explicit_padding(padding, weight, stride, dilation),
        dilation,
        groups,
        settings["precision"],
        settings["algorithm"],
    )


def _autocast(device: str) -> Callable[..., Tensor]:
    """The autocast kernel of conv2d_forward on that device."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys |= torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.device.type != device:
            return tensor
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device)) if eligible else tensor

    def kernel(input, weight, bias, *window):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _ops.conv2d_forward(cast(input), cast(weight), cast(bias), *window)

    return kernel
