"""im2col and col2im against F.unfold and F.fold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import ODD, Problem
from reference import DTYPES, LAYOUTS

import conv_ops

ops = torch.ops.convops

PROBLEMS = [
    problem
    for problem in ODD
    if problem.c > 0 and isinstance(problem.padding, tuple)  # F.unfold has no "same"
]


def window(problem: Problem) -> tuple:
    return problem.kernel, problem.dilation, problem.padding, problem.stride


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_im2col_is_unfold(problem: Problem, dtype: torch.dtype, layout: str, device: str) -> None:
    x = LAYOUTS[layout](torch.randn(problem.input_size, dtype=dtype, device=device))
    result = conv_ops.im2col(x, *window(problem))
    expected = F.unfold(x, *window(problem))
    assert torch.equal(result, expected)
    assert result.stride() == expected.stride()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_col2im_is_fold(problem: Problem, dtype: torch.dtype, layout: str, device: str) -> None:
    columns = F.unfold(torch.zeros(problem.input_size), *window(problem))
    columns = LAYOUTS[layout](torch.randn(columns.shape, dtype=dtype, device=device))
    size = (problem.h, problem.w)
    result = conv_ops.col2im(columns, size, *window(problem))
    # In fp64, then rounded once: F.fold itself sums 16-bit dtypes in 16 bits.
    exact = F.fold(columns.double(), size, *window(problem))
    magnitude = F.fold(columns.double().abs(), size, *window(problem))
    roundoff = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    taps = problem.kernel[0] * problem.kernel[1]
    bound = taps * roundoff * magnitude + torch.finfo(dtype).eps / 2 * exact.abs() * 1.01
    assert ((result.double() - exact).abs() <= bound).all()
    assert result.is_contiguous()


def test_unbatched(device: str) -> None:
    x = torch.randn(3, 7, 6, device=device)
    columns = F.unfold(x, 3)
    assert torch.equal(conv_ops.im2col(x, 3), columns)
    torch.testing.assert_close(conv_ops.col2im(columns, (7, 6), 3), F.fold(columns, (7, 6), 3))


def test_no_images(device: str) -> None:
    x = torch.randn(0, 3, 7, 6, device=device)
    columns = conv_ops.im2col(x, (3, 2))
    assert columns.shape == F.unfold(x, (3, 2)).shape
    assert conv_ops.col2im(columns, (7, 6), (3, 2)).shape == x.shape


REFUSED = {
    "input has no batch or channels": (lambda: ops.im2col(torch.zeros(4, 4), 3), "3D or 4D"),
    "kernel size": (lambda: ops.im2col(torch.zeros(1, 1, 4, 4), 0), "kernel_height: 0"),
    "kernel of three": (
        lambda: ops.im2col(torch.zeros(1, 1, 4, 4), [3, 3, 3]),
        "kernel_size equals to 2, but got size 3",
    ),
    "stride": (lambda: ops.im2col(torch.zeros(1, 1, 4, 4), 3, 1, 0, 0), "stride_height: 0"),
    "padding": (lambda: ops.im2col(torch.zeros(1, 1, 4, 4), 3, 1, -1), "pad_height: -1"),
    "dilation": (lambda: ops.im2col(torch.zeros(1, 1, 4, 4), 3, 0), "dilation_height: 0"),
    "no block": (lambda: ops.im2col(torch.zeros(1, 1, 4, 4), 5), r"spatial size \(4, 4\)"),
    "integers": (lambda: ops.im2col(torch.zeros(1, 1, 4, 4).long(), 3), "not implemented for"),
    "columns' size": (
        lambda: ops.col2im(torch.zeros(1, 9, 5), (4, 4), 3),
        r"2 \* 2 = 4, but got input.size\(2\)=5",
    ),
    "columns' channels": (
        lambda: ops.col2im(torch.zeros(1, 8, 4), (4, 4), 3),
        r"input.size\(1\)=8 and kernel_size=\(3, 3\)",
    ),
    "columns' dimensions": (lambda: ops.col2im(torch.zeros(4), (4, 4), 3), "2D or 3D"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_pytorch_does(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(RuntimeError, match=words):
        call()
