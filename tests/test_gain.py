"""Errors without a direction: results are not smaller on average than what they should be.

Tensor cores cut off what they have no bits for, always towards zero. Of a single convolution that
is within any bound; in a network in inference such gains below 1 multiply from layer to layer.
"""

from __future__ import annotations

import pytest
import reference
import torch
from problems import Problem
from test_accuracy import calls, convolve, each_direction, operands

# As much as a rounding may take. Errors without a direction leave 1 / sqrt(results) of theirs,
# less than 2^-30; the mean loss that is given back is known up to a fifth.
MOST = reference.SUM_ROUNDOFF[torch.float32]


@pytest.mark.parametrize("data", ["normal", "relu"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem("three_by_three", 2, 64, 28, 28, 64, (3, 3), padding=(1, 1)),
        Problem("deep", 2, 512, 14, 14, 64, (3, 3), padding=(1, 1)),
        Problem("pointwise", 2, 256, 28, 28, 64, (1, 1)),
        Problem("deep_pointwise", 2, 1024, 28, 28, 256, (1, 1)),
        Problem("strided", 2, 128, 28, 28, 128, (3, 3), (2, 2), (1, 1)),
        Problem("few_channels", 2, 8, 28, 28, 64, (1, 1)),
        Problem("stem", 2, 3, 96, 96, 64, (7, 7), (2, 2), (3, 3)),
        Problem("grouped", 2, 128, 28, 28, 128, (3, 3), padding=(1, 1), groups=32),
        Problem("sixteen_a_group", 2, 224, 28, 28, 224, (3, 3), padding=(1, 1), groups=14),
        Problem("depthwise", 2, 192, 28, 28, 192, (7, 7), padding=(3, 3), groups=192),
    ],
    ids=lambda p: p.name,
)
@each_direction
def test_results_have_no_gain(problem: Problem, direction: str, data: str, device: str) -> None:
    x, w = operands(problem, direction, data)
    expected = convolve(problem, direction, x, w)
    for algorithm, result in calls(problem, direction, x.to(device), w.to(device), "ieee"):
        error = result.double() - expected
        gain = float((error * expected).sum() / expected.square().sum())
        assert abs(gain) <= MOST, f"{algorithm}: gain 1 {gain:+.2e}"
