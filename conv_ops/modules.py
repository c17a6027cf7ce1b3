"""``Conv2d`` and ``LazyConv2d``: the modules of ``torch.nn`` with this package's convolution."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conv_ops import functional, settings


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` computed by this package.

    The constructor's arguments, the initial parameters of a seed, the ``state_dict`` and the
    results' layout are those of :class:`torch.nn.Conv2d`.

    Args:
        in_channels: Number of channels of the input.
        out_channels: Number of channels of the output.
        kernel_size: One number or ``(height, width)``; so are the next three.
        stride: Distance of the kernel's positions.
        padding: Padding of both sides, or ``"valid"`` or ``"same"``.
        dilation: Distance of the kernel's elements.
        groups: Number of groups that the channels are divided into.
        bias: Whether to add a learnable bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: Device of the parameters.
        dtype: Dtype of the parameters: float32, float64, float16 or bfloat16.
        precision: Arithmetic of float32 on CUDA in this module, ``"ieee"`` or ``"tf32"``;
            None follows :mod:`conv_ops.settings`. May be changed later by assignment, like
            ``algorithm``.
        algorithm: Name of the algorithm of this module; None follows :mod:`conv_ops.settings`.

    Shape:
        Input ``(N, C, H, W)`` or ``(C, H, W)``, output ``(N, O, OH, OW)`` or ``(O, OH, OW)``.

    Raises:
        ValueError: If the arguments do not make a convolution, or precision or algorithm is
            unknown.
    """

    __constants__: ClassVar = [*nn.Conv2d.__constants__, "precision", "algorithm"]

    # Of the class, so that a module that was an nn.Conv2d has them too.
    precision: str | None = None
    algorithm: str | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
        algorithm: str | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.precision = settings.check_precision(precision)
        self.algorithm = settings.check_algorithm(algorithm)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # TorchScript drops the branches that constants rule out, hence no common variables.
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        if self.precision is None and self.algorithm is None:
            if self.padding_mode != "zeros":
                return functional.conv2d(
                    input, weight, bias, self.stride, 0, self.dilation, self.groups
                )
            return functional.conv2d(
                input, weight, bias, self.stride, self.padding, self.dilation, self.groups
            )
        if self.padding_mode != "zeros":
            padding = [0, 0]
        elif isinstance(self.padding, str):
            left, right, top, bottom = self._reversed_padding_repeated_twice
            padding = [top, bottom, left, right]
        else:
            padding = [self.padding[0], self.padding[1]]
        return functional.conv2d_with(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.precision,
            self.algorithm,
        )

    def extra_repr(self) -> str:
        """As in ``torch.nn``, with the precision and algorithm that the module has of its own."""
        text = super().extra_repr()
        for name in ("precision", "algorithm"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text


class LazyConv2d(nn.LazyConv2d, Conv2d):
    """:class:`Conv2d` that takes ``in_channels`` from its first input, as in ``torch.nn``.

    Args:
        out_channels: As in :class:`Conv2d`; so is all that is not named here.
    """

    cls_to_become = Conv2d

    def __init__(
        self,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str | None = None,
        algorithm: str | None = None,
    ) -> None:
        super().__init__(
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.precision = settings.check_precision(precision)
        self.algorithm = settings.check_algorithm(algorithm)
