"""Fake kernels: the shape, strides and dtype of each op's result, without data.

``torch.compile``, ``torch.export`` and meta tensors run these in place of the kernels. They are in
Python whichever way autograd was loaded, because only here a fake tensor tells its real device,
on which the memory format depends.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from conv_ops.functional import conv2d_with, explicit_padding


def register() -> None:
    """Registers the fake kernels of all ops of the package."""
    for name, kernel in {
        "conv2d": _conv2d,
        "conv2d.padding": _conv2d,
        "conv2d_forward": _conv2d_forward,
        "conv2d_backward_input": _conv2d_backward_input,
        "conv2d_backward_weight": _conv2d_backward_weight,
        "im2col": _im2col,
        "col2im": _col2im,
    }.items():
        torch.library.register_fake(f"convops::{name}", kernel)


def _conv2d(input, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    sides = explicit_padding(padding, weight, stride, dilation)
    return conv2d_with(input, weight, bias, stride, sides, dilation, groups, None, None)


def _conv2d_forward(
    input, weight, bias, stride, padding, dilation, groups, precision=None, algorithm=None
):
    size = _output_size(input.shape, weight.shape, stride, padding, dilation, groups)
    _check_same_kind(Input=input, weight=weight)
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            lambda: (
                f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional "
                f"with {weight.shape[0]} elements, but got bias of size {list(bias.shape)} instead"
            ),
        )
        _check_same_kind(Input=input, bias=bias)
    return _new_result(size, input, weight)


def _conv2d_backward_input(
    grad_output,
    weight,
    input_size,
    stride,
    padding,
    dilation,
    groups,
    precision=None,
    algorithm=None,
):
    size = _output_size(input_size, weight.shape, stride, padding, dilation, groups)
    _check_grad_output(grad_output, size)
    _check_same_kind(grad_output=grad_output, weight=weight)
    return _new_result(input_size, grad_output, weight)


def _conv2d_backward_weight(
    grad_output,
    input,
    weight_size,
    weight_stride,
    stride,
    padding,
    dilation,
    groups,
    precision=None,
    algorithm=None,
):
    size = _output_size(input.shape, weight_size, stride, padding, dilation, groups)
    _check_grad_output(grad_output, size)
    _check_same_kind(grad_output=grad_output, input=input)
    if weight_stride:
        return grad_output.new_empty_strided(weight_size, weight_stride)
    return grad_output.new_empty(weight_size)


def _im2col(input, kernel_size, dilation=(1,), padding=(0,), stride=(1,)):
    torch._check(
        input.dim() in (3, 4),
        lambda: f"Expected 3D or 4D (batch mode) tensor for input, but got: {list(input.shape)}",
    )
    *batch, channels, height, width = input.shape
    blocks = _blocks((height, width), kernel_size, dilation, padding, stride)
    return input.new_empty(*batch, channels * _taps(kernel_size), blocks)


def _col2im(input, output_size, kernel_size, dilation=(1,), padding=(0,), stride=(1,)):
    torch._check(
        input.dim() in (2, 3),
        lambda: f"Expected 2D or 3D (batch mode) tensor for input, but got: {list(input.shape)}",
    )
    *batch, rows, columns = input.shape
    taps = _taps(kernel_size)
    blocks = _blocks(output_size, kernel_size, dilation, padding, stride)
    torch._check(
        rows % taps == 0,
        lambda: (
            "Expected size of input's dimension 1 to be divisible by the product of kernel_size, "
            f"but got input of size {list(input.shape)} and kernel_size={list(kernel_size)}"
        ),
    )
    torch._check(
        columns == blocks,
        lambda: (
            f"Given output_size={list(output_size)}, kernel_size={list(kernel_size)}, expected "
            f"{blocks} sliding blocks, but got input of size {list(input.shape)}"
        ),
    )
    return input.new_empty(*batch, rows // taps, output_size[0], output_size[-1])


def _taps(kernel_size: Sequence[int]) -> int:
    return kernel_size[0] * kernel_size[-1]


def _blocks(size, kernel_size, dilation, padding, stride) -> int:
    height, width = _positions(size, kernel_size, stride, padding, dilation)
    return height * width


def _output_size(input_size, weight_size, stride, padding, dilation, groups) -> list[int]:
    """The size of a convolution's output, or RuntimeError if the sizes do not fit together."""
    torch._check(
        len(weight_size) == 4,
        lambda: (
            f"Expected 4-dimensional weight for conv2d, but got weight of size: {list(weight_size)}"
        ),
    )
    torch._check(
        len(input_size) == 4,
        lambda: (
            "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: "
            f"{list(input_size)}"
        ),
    )
    torch._check(
        groups > 0, lambda: f"non-positive groups is not supported, but got groups={groups}"
    )
    torch._check(
        weight_size[0] % groups == 0,
        lambda: (
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size {list(weight_size)} instead"
        ),
    )
    torch._check(
        input_size[1] == weight_size[1] * groups,
        lambda: (
            f"Given groups={groups}, weight of size {list(weight_size)}, expected input"
            f"{list(input_size)} to have {weight_size[1] * groups} channels, but got "
            f"{input_size[1]} channels instead"
        ),
    )
    positions = _positions(input_size[2:], weight_size[2:], stride, padding, dilation)
    return [input_size[0], weight_size[0], *positions]


def _positions(size, kernel_size, stride, padding, dilation) -> list[int]:
    """The number of places of a window in each dimension of an image."""
    if len(padding) == 4:
        sides = (padding[:2], padding[2:])
    else:
        sides = tuple((pad, pad) for pad in _pair("padding", padding))
    axes = zip(
        _pair("size", size),
        _pair("kernel size", kernel_size),
        _pair("stride", stride),
        sides,
        _pair("dilation", dilation),
        strict=True,
    )
    return [_positions_along(*axis) for axis in axes]


def _positions_along(size, kernel_size, stride, sides, dilation) -> int:
    before, after = sides
    torch._check(
        before >= 0 and after >= 0,
        lambda: f"negative padding is not supported, but got padding={sides}",
    )
    torch._check(
        stride > 0, lambda: f"non-positive stride is not supported, but got stride={stride}"
    )
    torch._check(
        dilation > 0, lambda: f"non-positive dilation is not supported, but got dilation={dilation}"
    )
    padded = size + before + after
    extent = dilation * (kernel_size - 1) + 1
    torch._check(
        padded >= extent,
        lambda: (
            f"Calculated padded input size per channel: {padded}. Kernel size: {extent}. "
            "Kernel size can't be greater than actual input size"
        ),
    )
    return (padded - extent) // stride + 1


def _pair(name: str, values: Sequence[int]) -> tuple[int, int]:
    torch._check(
        len(values) in (1, 2),
        lambda: (
            f"expected {name} to be a single integer value or a list of 2 values to match the "
            f"convolution dimensions, but got {name}={list(values)}"
        ),
    )
    return values[0], values[-1]


def _check_grad_output(grad_output: Tensor, size: Sequence[int]) -> None:
    def message() -> str:
        actual = list(grad_output.shape)
        return f"Expected grad_output of size {list(size)}, but got grad_output of size {actual}"

    torch._check(grad_output.dim() == len(size), message)
    for actual, expected in zip(grad_output.shape, size, strict=True):
        torch._check(actual == expected, message)


def _check_same_kind(**tensors: Tensor) -> None:
    (a_name, a), (b_name, b) = tensors.items()
    torch._check(
        a.device == b.device,
        lambda: (
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{a.device} ({a_name}) and {b.device} ({b_name})!"
        ),
    )
    torch._check(
        a.dtype == b.dtype,
        lambda: f"{a_name} type ({a.dtype}) and {b_name} type ({b.dtype}) should be the same",
    )


def _new_result(size: Sequence[int], a: Tensor, b: Tensor) -> Tensor:
    """As PyTorch: channels_last if either operand is, but never for float64 on CUDA."""
    layout = torch.contiguous_format
    if not (a.is_cuda and a.dtype == torch.float64):
        if torch.channels_last in (suggest_memory_format(a), suggest_memory_format(b)):
            layout = torch.channels_last
    return torch.empty(size, dtype=a.dtype, device=a.device, memory_format=layout)
