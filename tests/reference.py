"""What results are held against: fp64 convolutions and the error that arithmetic allows.

A sum of K products in a precision with unit roundoff u has an error of at most about
c · sqrt(K) · u · Σ|x||w| for rounding errors of random sign (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., section 2.8 and 3.1), plus one rounding of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from problems import Problem
from torch import Tensor

# Unit roundoff of the arithmetic sums are kept in, and of the dtype results are stored in.
SUM_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-24,
}
RESULT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TF32_ROUNDOFF = 2.0**-11
# Sums of K roundings of random sign stay within this many standard deviations.
SAFETY = 4.0

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.stack([t, t], dim=-1).flatten(-2)[..., ::2],
    "transposed": lambda t: t.mT.contiguous().mT,
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "expanded": lambda t: t[:1, :1].expand_as(t),
}


def operands(
    problem: Problem, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Random input, weight, bias and grad_output of a problem.

    Each is drawn in float64 on the CPU and rounded: every device sees the same numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    weight_scale = 1 / math.sqrt(max(1, problem.taps))
    return (
        draw(*problem.input_size),
        draw(*problem.weight_size) * weight_scale,
        draw(problem.o) if problem.bias else None,
        draw(*problem.output_size),
    )


def forward(problem: Problem, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution, in float64 on the CPU."""
    x, w = x.double().cpu(), w.double().cpu()
    bias = None if bias is None else bias.double().cpu()
    if problem.c == 0:  # F.conv2d's own answer has no channels
        result = torch.zeros(problem.output_size, dtype=torch.float64)
        return result if bias is None else result + bias.view(1, -1, 1, 1)
    return F.conv2d(x, w, bias, problem.stride, problem.padding, problem.dilation, problem.groups)


def backward_input(problem: Problem, grad_output: Tensor, w: Tensor) -> Tensor:
    """The gradient of the input, in float64 on the CPU."""
    x = torch.zeros(problem.input_size, dtype=torch.float64)
    return _gradient(problem, x, w.double().cpu(), grad_output, wanted=0)


def backward_weight(problem: Problem, grad_output: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight, in float64 on the CPU."""
    w = torch.zeros(problem.weight_size, dtype=torch.float64)
    return _gradient(problem, x.double().cpu(), w, grad_output, wanted=1)


def _gradient(
    problem: Problem, x: Tensor, w: Tensor, grad_output: Tensor, *, wanted: int
) -> Tensor:
    if problem.n == 0 or problem.c == 0:
        return torch.zeros_like((x, w)[wanted])
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = forward(problem, x, w, None)
    (result,) = torch.autograd.grad(y, (x, w)[wanted], grad_output.double().cpu())
    return result


def compute(
    problem: Problem, direction: str, x: Tensor, w: Tensor, bias: Tensor | None, grad_output: Tensor
) -> Tensor:
    """What an op of that direction makes of the operands, in float64 on the CPU."""
    if direction == "forward":
        return forward(problem, x, w, bias)
    if direction == "backward_input":
        return backward_input(problem, grad_output, w)
    return backward_weight(problem, grad_output, x)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    length: int,
    *,
    precision: str = "ieee",
    label: str = "",
) -> None:
    """Holds a result against fp64, element by element.

    Args:
        actual: The result.
        expected: The result in float64.
        magnitude: The same operation on the operands' absolute values, in float64.
        length: How many products an element sums.
        precision: "tf32" allows float32 operands to be rounded to TF32.
        label: What an error begins with: whose result this is.
    """
    assert actual.shape == expected.shape
    roundoff = SUM_ROUNDOFF[actual.dtype]
    if precision == "tf32" and actual.dtype == torch.float32:
        roundoff = TF32_ROUNDOFF
    bound = (
        SAFETY * math.sqrt(max(1, length)) * roundoff * magnitude
        + RESULT_ROUNDOFF[actual.dtype] * expected.abs() * 1.01
        # Results may be subnormal in the dtype.
        + torch.finfo(actual.dtype).smallest_normal * RESULT_ROUNDOFF[actual.dtype]
    )
    error = (actual.double().cpu() - expected).abs()
    worst = (error / bound).nan_to_num(nan=math.inf).flatten()
    # Equal infinities and NaN in the same places are right.
    same = (actual.double().cpu() == expected) | (actual.double().cpu().isnan() & expected.isnan())
    worst = torch.where(same.flatten(), 0.0, worst)
    if worst.numel() and worst.max() > 1:
        index = int(worst.argmax())
        raise AssertionError(
            f"{label}: element {index} is {actual.flatten()[index].item()}, expected "
            f"{expected.flatten()[index].item()}: {worst[index]:.3g} times the bound "
            f"{bound.flatten()[index].item():.3g}"
        )
