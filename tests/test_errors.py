"""Bad input is refused before any kernel runs, in PyTorch's words and with the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import conv_ops

ops = torch.ops.convops


def x(*size: int, **options: Any) -> Tensor:
    return torch.zeros(size or (2, 4, 8, 8), **options)


def w(*size: int, **options: Any) -> Tensor:
    return torch.zeros(size or (6, 2, 3, 3), **options)


# name: arguments of conv2d, words of the message; the words PyTorch has for it come first.
REFUSED: dict[str, tuple[Callable[[], tuple], str]] = {
    "zero stride": (
        lambda: (x(), w(), None, 0, 0, 1, 2),
        r"non-positive stride is not supported.*stride=\[0, 0\]",
    ),
    "negative stride": (
        lambda: (x(), w(), None, (1, -1), 0, 1, 2),
        r"non-positive stride is not supported.*\[1, -1\]",
    ),
    "negative padding": (
        lambda: (x(), w(), None, 1, (-1, 0), 1, 2),
        r"negative padding is not supported.*\[-1, 0\]",
    ),
    "zero dilation": (
        lambda: (x(), w(), None, 1, 0, 0, 2),
        r"non-positive dilation is not supported.*\[0, 0\]",
    ),
    "zero groups": (
        lambda: (x(), w(), None, 1, 0, 1, 0),
        "non-positive groups is not supported.*groups=0",
    ),
    "channels against groups": (
        lambda: (x(), w(), None, 1, 0, 1, 3),
        r"Given groups=3, weight of size \[6, 2, 3, 3\], expected input\[2, 4, 8, 8\] to have "
        r"6 channels, but got 4 channels instead",
    ),
    "weight against groups": (
        lambda: (x(), w(5, 2, 3, 3), None, 1, 0, 1, 2),
        r"Given groups=2, expected weight to be divisible by 2 at dimension 0.*\[5, 2, 3, 3\]",
    ),
    "no filters": (
        lambda: (x(), w(0, 2, 3, 3), None, 1, 0, 1, 2),
        "Given groups=2, expected weight to be at least 2 at dimension 0",
    ),
    "input of 2 dimensions": (
        lambda: (x(8, 8), w()),
        r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d, but got input of size: "
        r"\[8, 8\]",
    ),
    "input of 5 dimensions": (
        lambda: (x(1, 2, 4, 8, 8), w()),
        r"Expected 3D \(unbatched\) or 4D \(batched\) input to conv2d.*\[1, 2, 4, 8, 8\]",
    ),
    "weight of 3 dimensions": (
        lambda: (x(), w(2, 3, 3)),
        r"Expected 4-dimensional weight.*\[2, 3, 3\]",
    ),
    "kernel larger than input": (
        lambda: (x(), w(6, 4, 9, 3)),
        r"Calculated padded input size per channel: \(8 x 8\). Kernel size: \(9 x 3\). "
        "Kernel size can't be greater than actual input size",
    ),
    "bias of 2 dimensions": (
        lambda: (x(), w(), torch.zeros(6, 1), 1, 0, 1, 2),
        r"Given weight of size \[6, 2, 3, 3\], expected bias to be 1-dimensional with 6 elements, "
        r"but got bias of size \[6, 1\] instead",
    ),
    "bias of another length": (
        lambda: (x(), w(), torch.zeros(5), 1, 0, 1, 2),
        "expected bias to be 1-dimensional with 6 elements",
    ),
    "empty image": (
        lambda: (x(2, 4, 0, 8), w(), None, 1, 2, 1, 2),
        r"Only zero batch or zero channel inputs are supported.*\[2, 4, 0, 8\]",
    ),
    "weight of another dtype": (
        lambda: (x(), w(dtype=torch.double), None, 1, 0, 1, 2),
        r"Input type \(float\) and weight type \(double\) should be the same",
    ),
    "bias of another dtype": (
        lambda: (x(), w(), torch.zeros(6, dtype=torch.double), 1, 0, 1, 2),
        r"Input type \(float\) and bias type \(double\) should be the same",
    ),
    "integers": (
        lambda: (x(dtype=torch.long), w(dtype=torch.long), None, 1, 0, 1, 2),
        "not implemented for 'Long'",
    ),
    "booleans": (
        lambda: (x(dtype=torch.bool), w(dtype=torch.bool), None, 1, 0, 1, 2),
        "not implemented for 'Bool'",
    ),
    "complex numbers": (
        lambda: (x(dtype=torch.cfloat), w(dtype=torch.cfloat), None, 1, 0, 1, 2),
        "not implemented for 'ComplexFloat'",
    ),
    "sparse input": (lambda: (x().to_sparse(), w(), None, 1, 0, 1, 2), "SparseCPU"),
    "sparse weight": (lambda: (x(), w().to_sparse(), None, 1, 0, 1, 2), "Sparse"),
    "same with stride": (
        lambda: (x(), w(), None, 2, "same", 1, 2),
        "padding='same' is not supported for strided convolutions",
    ),
    "unknown padding": (
        lambda: (x(), w(), None, 1, "foo", 1, 2),
        "Invalid padding string: 'foo'",
    ),
    "stride of three": (
        lambda: (x(), w(), None, (1, 2, 3), 0, 1, 2),
        "expected stride to be a single integer value or a list of 2 values to match the "
        r"convolution dimensions, but got stride=\[1, 2, 3\]",
    ),
    "padding of four": (
        lambda: (x(), w(), None, 1, (1, 2, 3, 4), 1, 2),
        r"expected padding to be a single integer value or a list of 2 values.*\[1, 2, 3, 4\]",
    ),
    "dilation of none": (
        lambda: (x(), w(), None, 1, 0, (), 2),
        r"expected dilation to be a single integer value or a list of 2 values.*dilation=\[\]",
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("call", [ops.conv2d, conv_ops.conv2d], ids=["op", "function"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, call: Callable[..., Tensor], grad: bool) -> None:
    make, words = REFUSED[name]
    arguments = make()
    if grad and arguments[0].is_floating_point():
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(RuntimeError, match=words):
        call(*arguments)


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_quantized_input_is_refused() -> None:
    quantized = torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8)
    with pytest.raises(RuntimeError, match=r"QuantizedCPU|not implemented for 'QInt8'"):
        ops.conv2d(quantized, w(), None, 1, 0, 1, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("where", ["input", "weight", "bias"])
def test_two_devices_are_refused(where: str) -> None:
    tensors = {"input": x(), "weight": w(), "bias": torch.zeros(6)}
    tensors[where] = tensors[where].cuda()
    with pytest.raises(RuntimeError, match=r"on the same device.*cuda:0"):
        ops.conv2d(*tensors.values(), 1, 0, 1, 2)


def test_gradient_of_another_size_is_refused(device: str) -> None:
    grad_output = torch.zeros(2, 6, 5, 6, device=device)
    with pytest.raises(RuntimeError, match=r"grad_output of size \[2, 6, 6, 6\].*\[2, 6, 5, 6\]"):
        ops.conv2d_backward_input(
            grad_output, w(device=device), (2, 4, 8, 8), [1, 1], [0, 0], [1, 1], 2
        )
    with pytest.raises(RuntimeError, match=r"grad_output of size \[2, 6, 6, 6\].*\[2, 6, 5, 6\]"):
        ops.conv2d_backward_weight(
            grad_output, x(device=device), (6, 2, 3, 3), [], [1, 1], [0, 0], [1, 1], 2
        )


def test_unknown_precision_and_algorithm_are_refused(device: str) -> None:
    arguments = (x(device=device), w(device=device), None, [1], [0], [1], 2)
    with pytest.raises(RuntimeError, match="'ieee' or 'tf32', but got precision='fp8'"):
        ops.conv2d_forward(*arguments, "fp8")
    with pytest.raises(RuntimeError, match=r"no algorithm 'magic'.*'im2col_gemm'.*'direct'"):
        ops.conv2d_forward(*arguments, None, "magic")


def test_a_failed_call_leaves_no_state_behind(device: str) -> None:
    before = conv_ops.settings.get()
    tensors = (torch.randn(2, 4, 8, 8, device=device), torch.randn(6, 2, 3, 3, device=device))
    expected = ops.conv2d(*tensors, None, 1, 0, 1, 2)
    with (
        pytest.raises(RuntimeError, match="workspace"),
        conv_ops.settings.algorithm("im2col_gemm"),
        conv_ops.settings.workspace_limit(1),
    ):
        ops.conv2d(*tensors, None, 1, 0, 1, 2)
    assert conv_ops.settings.get() == before
    assert torch.equal(ops.conv2d(*tensors, None, 1, 0, 1, 2), expected)
