"""What a loop of fp32 fused multiply-adds needs: test_accuracy.py allows all algorithms twice that.

`python tests/test_fma_loop.py` prints it for all problems and data, and what perfect TF32 needs.
"""

from __future__ import annotations

import math

import pytest
import reference
import torch
from problems import Problem
from test_accuracy import (
    DATA,
    DIRECTIONS,
    FMA_LOOP,
    IEEE_ROUNDOFF,
    PROBLEMS,
    ROUNDS_TO_INFINITY,
    Case,
    case_of,
    convolve,
    each_direction,
    length,
    roundings,
    tf32_magnitude,
)
from torch import Tensor


def fma_loop(problem: Problem, direction: str, x: Tensor, w: Tensor) -> Tensor:
    """The convolution by one fp32 fused multiply-add after another: channels, then taps."""
    forward, groups = direction == "forward", problem.groups
    (top, bottom, left, right), (stride_h, stride_w) = problem.padding_sides, problem.stride
    height, width = problem.output_size[2:]
    w = w.double().unflatten(0, (groups, -1))  # group, out channel, channel, tap
    x = x.double().unflatten(1, (groups, -1))
    if forward:
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        result = torch.zeros(problem.output_size)
        sums = result.unflatten(1, (groups, -1))
    else:
        n, c, h, width_in = problem.input_size
        result = torch.zeros(n, c, h + top + bottom, width_in + left + right)
        sums = result.unflatten(1, (groups, -1))
    for channel in range(x.shape[2]):
        for kh in range(problem.kernel[0]):
            for kw in range(problem.kernel[1]):
                begin_h, begin_w = kh * problem.dilation[0], kw * problem.dilation[1]
                window = (
                    ...,
                    slice(begin_h, begin_h + (height - 1) * stride_h + 1, stride_h),
                    slice(begin_w, begin_w + (width - 1) * stride_w + 1, stride_w),
                )
                factors = (w[:, :, channel] if forward else w[:, channel])[..., kh, kw]
                values = x[:, :, channel, None][window if forward else ...]
                part = sums if forward else sums[window]
                # The product is exact in float64.
                part.copy_(part.double() + values * factors[..., None, None])
    if forward:
        return result
    return result[..., top : top + problem.h, left : left + problem.w]


def needed(case: Case, result: Tensor, roundoff: float) -> float:
    """The least c that allows for the result."""
    inside = (case.expected.abs() < ROUNDS_TO_INFINITY * 0.99) & (case.magnitude > 0)
    error = (result.double() - case.expected).abs() - roundings(case)
    unit = roundoff * math.sqrt(case.length) * case.magnitude
    return float((error / unit)[inside].max().clamp(min=0)) if inside.any() else 0.0


@pytest.mark.parametrize("data", ["normal", "positive", "lognormal", "channels", "subnormal"])
@pytest.mark.parametrize(
    "problem",
    [p for p in PROBLEMS if p.name in ("dense", "strided", "narrow", "grouped")],
    ids=lambda p: p.name,
)
@each_direction
def test_fma_loop_is_within_half_the_bound(problem: Problem, direction: str, data: str) -> None:
    case = case_of(problem, direction, data)
    result = fma_loop(problem, direction, case.x, case.w)
    assert needed(case, result, IEEE_ROUNDOFF) <= FMA_LOOP


def round_to_tf32(tensor: Tensor) -> Tensor:
    """To the nearest number of 11 bits, ties to even."""
    # The exponent of the smallest normal number is that of all below.
    exponent = torch.frexp(tensor.double()).exponent.clamp(min=-125)
    return torch.ldexp(torch.ldexp(tensor.double(), 11 - exponent).round(), exponent - 11)


def main() -> None:
    """Prints what c the FMA loop needs, and perfect TF32."""
    for problem in PROBLEMS:
        for direction in DIRECTIONS:
            print(f"{problem.name} {direction}, K = {length(problem, direction)}")
            for data in DATA:
                case = case_of(problem, direction, data)
                result = fma_loop(problem, direction, case.x, case.w)
                loop = needed(case, result, IEEE_ROUNDOFF)
                result = convolve(problem, direction, round_to_tf32(case.x), round_to_tf32(case.w))
                raised = case._replace(magnitude=tf32_magnitude(problem, direction, case))
                tf32 = needed(raised, result, reference.TF32_ROUNDOFF)
                print(f"  {data:20} {loop:7.3f} {tf32:7.3f}", flush=True)


if __name__ == "__main__":
    main()
