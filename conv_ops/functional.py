"""The functions of the package: ``conv2d``, ``im2col`` and ``col2im``."""

from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor

# TorchScript code that calls these functions calls the ops themselves.
from torch.jit._builtins import _register_builtin

# Looked up once: a call of a small convolution feels it.
_conv2d = torch.ops.convops.conv2d.default
_conv2d_padding = torch.ops.convops.conv2d.padding


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    precision: str | None = None,
    algorithm: str | None = None,
) -> Tensor:
    """Two-dimensional convolution, as :func:`torch.nn.functional.conv2d`.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, of float32, float64, float16 or bfloat16.
        weight: ``(O, C / groups, KH, KW)``, of the input's dtype and device.
        bias: ``(O)`` or None.
        stride: One number or ``(height, width)``.
        padding: One number, ``(height, width)``, ``"valid"`` (none) or ``"same"`` (the output is
            as large as the input; needs stride 1; an odd total puts the extra row and column at
            the bottom and the right).
        dilation: One number or ``(height, width)``.
        groups: Number of groups that the channels are divided into.
        precision: Arithmetic of float32 on CUDA in this call, ``"ieee"`` or ``"tf32"``;
            None follows :mod:`conv_ops.settings`.
        algorithm: Name of the algorithm of this call; None follows :mod:`conv_ops.settings`.

    Returns:
        ``(N, O, OH, OW)``, or ``(O, OH, OW)`` for unbatched input, in the memory format that
        :func:`torch.nn.functional.conv2d` gives.

    Raises:
        RuntimeError: If the arguments do not make a convolution, with the offending values.
    """
    if precision is None and algorithm is None:
        op = _conv2d_padding if isinstance(padding, str) else _conv2d
        # torch converts argument by argument: a pair takes twice as long as a number.
        stride, padding, dilation = _number(stride), _number(padding), _number(dilation)
        if dilation == 1 and groups == 1:
            return op(input, weight, bias, stride, padding)
        return op(input, weight, bias, stride, padding, dilation, groups)
    return conv2d_with(
        input,
        weight,
        bias,
        _pair(stride),
        explicit_padding(padding, weight, stride, dilation),
        _pair(dilation),
        groups,
        precision,
        algorithm,
    )


def im2col(
    input: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """The patches of an image as columns, as :func:`torch.nn.functional.unfold`.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, of float32, float64, float16 or bfloat16.
        kernel_size: Size of a patch; like the next three one number or ``(height, width)``.
        dilation: Distance of the elements of a patch.
        padding: Zeros around the image.
        stride: Distance of the patches.

    Returns:
        ``(N, C * KH * KW, L)`` or ``(C * KH * KW, L)`` with one column for each of L patches.

    Raises:
        RuntimeError: If the arguments are illegal or leave no patch, with the offending values.
    """
    return torch.ops.convops.im2col(input, kernel_size, dilation, padding, stride)


def col2im(
    input: Tensor,
    output_size: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> Tensor:
    """The sum of columns into an image, as :func:`torch.nn.functional.fold`.

    Args:
        input: ``(N, C * KH * KW, L)`` or ``(C * KH * KW, L)``, of float32, float64, float16 or
            bfloat16.
        output_size: Size of the image; like the next four one number or ``(height, width)``.
        kernel_size: Size of a patch.
        dilation: Distance of the elements of a patch.
        padding: Zeros that were around the image.
        stride: Distance of the patches.

    Returns:
        ``(N, C, H, W)`` or ``(C, H, W)``.

    Raises:
        RuntimeError: If the arguments are illegal or do not fit together, with the offending
            values.
    """
    return torch.ops.convops.col2im(
        input, _pair(output_size), kernel_size, dilation, padding, stride
    )


for _function in (conv2d, im2col, col2im):
    _register_builtin(_function, f"convops::{_function.__name__}")


def conv2d_with(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    precision: str | None,
    algorithm: str | None,
) -> Tensor:
    """Convolution with a precision and algorithm of its own; TorchScript can compile it.

    They are arguments of the inner op, so that traced and compiled programs keep them. Its
    padding is ``(height, width)`` or ``(top, bottom, left, right)``.
    """
    op = torch.ops.convops.conv2d_forward
    if input.dim() != 3:
        return op(input, weight, bias, stride, padding, dilation, groups, precision, algorithm)
    batch = input.unsqueeze(0)
    output = op(batch, weight, bias, stride, padding, dilation, groups, precision, algorithm)
    return output.squeeze(0)


torch.fx.wrap("conv2d_with")  # symbolic tracing cannot follow a branch


def explicit_padding(
    padding: str | int | Sequence[int],
    weight: Tensor,
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
) -> list[int]:
    """The padding of :func:`conv2d` in the numbers that the inner op takes.

    Raises:
        RuntimeError: If the padding is no pair, an unknown word, or "same" with a stride.
    """
    if not isinstance(padding, str):
        padding = _pair(padding)
        if len(padding) > 2:  # the inner op would take four
            raise RuntimeError(
                "expected padding to be a single integer value or a list of 2 values to match "
                f"the convolution dimensions, but got padding={padding}"
            )
        return padding
    if padding not in ("same", "valid"):
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    if padding == "valid":
        return [0, 0]
    if any(step != 1 for step in _pair(stride)):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    dilation = _pair(dilation)
    if weight.dim() != 4 or len(dilation) not in (1, 2):
        return [0, 0]  # the op refuses the weight or the dilation
    height = dilation[0] * (weight.size(2) - 1)
    width = dilation[-1] * (weight.size(3) - 1)
    return [height // 2, height - height // 2, width // 2, width - width // 2]


def _number(value: str | int | Sequence[int]) -> str | int | Sequence[int]:
    """The number of a pair of equal ones; other values as they are."""
    if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return value


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, (int, torch.SymInt)) else list(value)
