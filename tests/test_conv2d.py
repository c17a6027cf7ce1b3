"""Every algorithm on every problem it accepts, in three directions, against fp64."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
from collections.abc import Iterator

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from problems import CHANNELS_LAST, DENSE_CHANNELS_LAST, HUGE, ODD, SEEDS, SMALL, Problem
from reference import DTYPES, LAYOUTS, assert_close
from torch import Tensor

import conv_ops
from conv_ops import _C

ops = torch.ops.convops

# What every algorithm meets one of: groups, and channels that are groups of their own.
GROUPED = Problem("grouped", 4, 8, 34, 30, 12, (3, 3), (1, 1), (1, 1), groups=2, bias=True)
DEPTHWISE = Problem("depthwise", 4, 8, 33, 31, 8, (3, 3), (1, 1), (1, 1), groups=8, bias=True)
each_kind = pytest.mark.parametrize("problem", [GROUPED, DEPTHWISE], ids=lambda p: p.name)

DIRECTIONS = ["forward", "backward_input", "backward_weight"]
ALGORITHMS = {
    device: [entry["name"] for entry in _C.algorithms() if entry["device"] == device]
    for device in ("cpu", "cuda")
}
each_algorithm = pytest.mark.parametrize(
    "algorithm", list(dict.fromkeys(itertools.chain(*ALGORITHMS.values())))
)


def run(
    problem: Problem,
    direction: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    grad_output: Tensor,
    *,
    precision: str = "ieee",
    algorithm: str | None = None,
) -> Tensor:
    window = (
        list(problem.stride),
        list(problem.padding_sides),
        list(problem.dilation),
        problem.groups,
        precision,
        algorithm,
    )
    if direction == "forward":
        return ops.conv2d_forward(x, w, bias, *window)
    if direction == "backward_input":
        return ops.conv2d_backward_input(grad_output, w, problem.input_size, *window)
    # As autograd: the weight's strides where a gradient can have them.
    stride = w.stride() if torch.empty_like(w).stride() == w.stride() else ()
    return ops.conv2d_backward_weight(grad_output, x, problem.weight_size, stride, *window)


def skip_if_missing(algorithm: str, device: str) -> None:
    if algorithm not in ALGORITHMS[device]:
        pytest.skip(f"{device} has no {algorithm}")


def is_refusal(error: RuntimeError) -> bool:
    """Whether an algorithm says that it cannot run the problem for what that is."""
    return "cannot run" in str(error) and "of workspace" not in str(error)


def run_or_skip(problem: Problem, direction: str, *tensors: Tensor | None, **options) -> Tensor:
    """`run`; skips where the algorithm refuses the problem."""
    try:
        return run(problem, direction, *tensors, **options)
    except RuntimeError as error:
        if not is_refusal(error):
            raise
        pytest.skip(str(error))


def results(
    problem: Problem, direction: str, *tensors: Tensor | None, **options: str
) -> Iterator[tuple[str, Tensor]]:
    """What every algorithm that accepts the problem makes of it.

    For tests whose reference takes longer than the algorithms, most of which refuse most problems:
    there they are no parameters.
    """
    for algorithm in ALGORITHMS[tensors[1].device.type]:
        try:
            result = run(problem, direction, *tensors, algorithm=algorithm, **options)
        except RuntimeError as error:
            if not is_refusal(error):
                raise
        else:
            yield algorithm, result


def expect(problem: Problem, direction: str, tensors: tuple) -> tuple[Tensor, Tensor, int]:
    """What `assert_close` holds a result against."""
    lengths = {
        "forward": problem.taps + problem.bias,
        "backward_input": problem.o // problem.groups * math.prod(problem.kernel),
        "backward_weight": problem.n * math.prod(problem.output_size[2:]),
    }
    magnitudes = (None if tensor is None else tensor.abs() for tensor in tensors)
    return (
        reference.compute(problem, direction, *tensors),
        reference.compute(problem, direction, *magnitudes),
        lengths[direction],
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.name)
def test_every_algorithm(problem: Problem, dtype: torch.dtype, direction: str, device: str) -> None:
    tensors = reference.operands(problem, dtype, device)
    expected = expect(problem, direction, tensors)
    for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
        for algorithm, result in results(problem, direction, *tensors, precision=precision):
            assert_close(result, *expected, precision=precision, label=algorithm)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=3)), ids="-".join)
def test_every_layout(layouts: tuple[str, str, str], direction: str, device: str) -> None:
    """Input, weight and gradient in any strides; PyTorch's output strides."""
    problem = Problem("layout", 3, 8, 7, 6, 12, (3, 2), (2, 1), (1, 1), groups=2, bias=True)
    x, w, bias, grad_output = reference.operands(problem, torch.float32, device)
    x, w, grad_output = (
        LAYOUTS[name](t) for name, t in zip(layouts, (x, w, grad_output), strict=True)
    )
    tensors = (x, w, bias, grad_output)
    expected = expect(problem, direction, tensors)
    for algorithm, result in results(problem, direction, *tensors):
        assert_close(result, *expected, label=algorithm)
        if direction == "forward":
            torchs = F.conv2d(x, w, bias, problem.stride, problem.padding, groups=problem.groups)
            assert result.stride() == torchs.stride(), algorithm
        elif direction == "backward_weight":
            assert result.stride() == torch.empty_like(w).stride(), algorithm


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["whole", "with_weight", "sliced"])
@pytest.mark.parametrize("problem", CHANNELS_LAST + DENSE_CHANNELS_LAST, ids=lambda p: p.name)
def test_channels_last(
    problem: Problem, form: str, dtype: torch.dtype, direction: str, device: str
) -> None:
    """Also with the weight, and as a slice of the channels, which begins anywhere."""
    x, w, bias, grad_output = reference.operands(problem, dtype, device)

    def dense_channels(tensor: Tensor) -> Tensor:
        if form != "sliced":
            return tensor.contiguous(memory_format=torch.channels_last)
        whole = torch.cat([tensor[:, :1], tensor, tensor], dim=1)
        return whole.contiguous(memory_format=torch.channels_last)[:, 1 : 1 + tensor.shape[1]]

    if form == "with_weight":
        w = dense_channels(w)
    tensors = (dense_channels(x), w, bias, dense_channels(grad_output))
    expected = expect(problem, direction, tensors)
    for algorithm, result in results(problem, direction, *tensors):
        assert_close(result, *expected, label=algorithm)


@pytest.mark.parametrize("problem", SEEDS, ids=lambda p: p.name)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chosen_algorithm_on_seeds(
    problem: Problem, direction: str, dtype: torch.dtype, device: str
) -> None:
    problem = problem.scaled(400_000)
    tensors = reference.operands(problem, dtype, device)
    assert_close(run(problem, direction, *tensors), *expect(problem, direction, tensors))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any legal problem whose tensors have at most some thousand elements."""
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    stride = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding: tuple[int, int] | str = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    if stride == (1, 1) and draw(st.booleans()):
        padding = "same"
    groups = draw(st.integers(1, 4))
    problem = Problem(
        "drawn",
        draw(st.integers(0, 3)),
        groups * draw(st.integers(1, 4)),
        draw(st.integers(1, 14)),
        draw(st.integers(1, 14)),
        groups * draw(st.integers(1, 4)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
    )
    assume(min(problem.output_size[2:]) >= 1)
    return problem


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    problem=problems(),
    dtype=st.sampled_from(DTYPES),
    direction=st.sampled_from(DIRECTIONS),
    channels_last=st.booleans(),
)
def test_drawn_problems(
    device: str, problem: Problem, dtype: torch.dtype, direction: str, channels_last: bool
) -> None:
    x, w, bias, grad_output = reference.operands(problem, dtype, device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tensors = (x, w, bias, grad_output)
    expected = expect(problem, direction, tensors)
    for algorithm, result in results(problem, direction, *tensors):
        assert_close(result, *expected, label=algorithm)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)], ids=["1x1", "3x3"])
def test_images_that_share_memory(
    kernel: tuple[int, int], dtype: torch.dtype, direction: str, device: str
) -> None:
    """Windows that slide over frames: pixels of all images in one row, which are no matrix."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    problem = Problem("windows", 4, 8, 6, 5, 12, kernel, (1, 1), padding)
    x, w, bias, grad_output = (
        t if t is None or t.shape == problem.weight_size else frames(t)
        for t in reference.operands(problem, dtype, device)
    )
    expected = expect(problem, direction, (x, w, bias, grad_output))
    for algorithm, result in results(problem, direction, x, w, bias, grad_output):
        assert_close(result, *expected, label=algorithm)


def frames(t: Tensor) -> Tensor:
    """Of the size of `t`: each image shares all but one channel with the next."""
    n, c, _, _ = t.shape
    film = torch.cat([t[0], t[1:, 0]])
    return film.unfold(0, c, 1).movedim(-1, 1)[:n]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", ODD, ids=lambda p: p.name)
def test_output_strides_are_those_of_torch(
    problem: Problem, dtype: torch.dtype, layout: str, device: str
) -> None:
    if problem.c == 0:
        pytest.skip("F.conv2d gives an output without channels")
    x, w, bias, _ = reference.operands(problem, dtype, device)
    x = LAYOUTS[layout](x)
    result = ops.conv2d_forward(
        x,
        w,
        bias,
        list(problem.stride),
        list(problem.padding_sides),
        list(problem.dilation),
        problem.groups,
    )
    # oneDNN (torch 2.13) crashes on padding past the kernel; switched off, strides are the same.
    with torch.backends.mkldnn.flags(enabled=problem.name != "padding_past_kernel"):
        expected = F.conv2d(
            x, w, bias, problem.stride, problem.padding, problem.dilation, problem.groups
        )
    assert result.shape == expected.shape
    assert result.stride() == expected.stride()
    assert result.dtype == expected.dtype


@pytest.mark.parametrize("direction", DIRECTIONS)
@each_kind
def test_same_bits_every_time(problem: Problem, direction: str, device: str) -> None:
    tensors = reference.operands(problem, torch.float32, device)
    for algorithm, first in results(problem, direction, *tensors):
        for _ in range(5):
            again = run(problem, direction, *tensors, algorithm=algorithm)
            assert torch.equal(first, again), algorithm


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("direction", "operand"),
    [
        *(("forward", operand) for operand in ("input", "weight", "bias")),
        *(("backward_input", operand) for operand in ("grad_output", "weight")),
        *(("backward_weight", operand) for operand in ("grad_output", "input")),
    ],
)
@each_kind
def test_nan_and_inf_stay_where_fp64_has_them(
    problem: Problem, direction: str, operand: str, value: float, device: str
) -> None:
    tensors = reference.operands(problem, torch.float32, device)
    operands = dict(zip(("input", "weight", "bias", "grad_output"), tensors, strict=True))
    operands[operand].flatten()[3] = value
    expected = reference.compute(problem, direction, *tensors)
    for algorithm, result in results(problem, direction, *tensors):
        actual = result.double().cpu()
        assert torch.equal(actual.isnan(), expected.isnan()), algorithm
        assert torch.equal(actual.isposinf(), expected.isposinf()), algorithm
        assert torch.equal(actual.isneginf(), expected.isneginf()), algorithm


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_16_bit_results_are_rounded_once(direction: str, device: str) -> None:
    """A second rounding, or sums in 16 bits, would miss fp64's nearest value far more often."""
    problem = Problem("rounding", 4, 64, 20, 20, 32, (3, 3), padding=(1, 1))
    for dtype in (torch.float16, torch.bfloat16):
        tensors = reference.operands(problem, dtype, device)
        actual = run(problem, direction, *tensors).cpu()
        expected = reference.compute(problem, direction, *tensors)
        # The double becomes the nearest 16-bit value; fp32 sums differ from it only close to a tie.
        assert (actual != expected.to(dtype)).double().mean() < 0.01


@pytest.mark.parametrize("direction", DIRECTIONS)
@each_algorithm
@pytest.mark.parametrize("limit", [0, 3_000, 40_000, 300_000])
@each_kind
def test_workspace_limit_is_kept(
    problem: Problem, algorithm: str, direction: str, limit: int, device: str
) -> None:
    """Chunks, not refusals, as soon as a row fits; right results in every number of chunks.

    implicit_gemm needs all its packed weights at once: some 75 000 bytes here.
    """
    skip_if_missing(algorithm, device)
    tensors = reference.operands(problem, torch.float32, device)
    with conv_ops.settings.workspace_limit(limit):
        try:
            result = run_or_skip(problem, direction, *tensors, algorithm=algorithm)
        except RuntimeError as error:
            assert f"the limit is {limit}" in str(error)
            assert algorithm != "direct" and limit <= 40_000
            return
    assert_close(result, *expect(problem, direction, tensors))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("limit", [1 << 22, 1 << 26])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS["cuda"])
@each_kind
def test_peak_memory_is_result_and_workspace(
    problem: Problem, algorithm: str, direction: str, limit: int
) -> None:
    problem = dataclasses.replace(problem, n=8, h=256, w=256)
    tensors = reference.operands(problem, torch.float32, "cuda")
    run_or_skip(
        problem, direction, *tensors, algorithm=algorithm
    )  # what cuBLAS keeps is there after this
    with conv_ops.settings.workspace_limit(limit):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run(problem, direction, *tensors, algorithm=algorithm)
        used = torch.cuda.max_memory_allocated() - before
    assert used <= result.numel() * result.element_size() + limit + 4096


@needs_cuda
@pytest.mark.parametrize("algorithm", ALGORITHMS["cuda"])
def test_out_of_memory_shrinks_the_workspace(algorithm: str) -> None:
    """With room for the result and little else a call succeeds; a failed one leaves nothing."""
    # Whose result is larger than what other tests may have left free of the allocator's segments.
    problem = Problem("memory", 64, 64, 128, 128, 64, (3, 3), padding=(1, 1))
    tensors = reference.operands(problem, torch.float32, "cuda")
    expected = run_or_skip(problem, "forward", *tensors, algorithm=algorithm)
    result_bytes = expected.numel() * expected.element_size()
    gc.collect()  # what is freed later would be room
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + result_bytes + (48 << 20)
    try:
        torch.cuda.set_per_process_memory_fraction(room / total)
        result = run(problem, "forward", *tensors, algorithm=algorithm)
        before = torch.cuda.memory_allocated()
        torch.cuda.set_per_process_memory_fraction((room - result_bytes) / total)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(problem, "forward", *tensors, algorithm=algorithm)
        assert torch.cuda.memory_allocated() == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS["cuda"])
@each_kind
def test_current_stream_and_graph_capture(problem: Problem, algorithm: str, direction: str) -> None:
    tensors = reference.operands(problem, torch.float32, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = run_or_skip(problem, direction, *tensors, algorithm=algorithm)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(eager, *expect(problem, direction, tensors))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(problem, direction, *tensors, algorithm=algorithm)
    for tensor in tensors:
        tensor.mul_(0.5)
    graph.replay()
    assert_close(captured, *expect(problem, direction, tensors))


@needs_cuda
@pytest.mark.parametrize("algorithm", ["im2col_gemm", "implicit_gemm"])
@pytest.mark.parametrize("direction", ["forward", "backward_input"])
def test_tf32_operands_are_rounded_to_nearest(direction: str, algorithm: str) -> None:
    """Cutting bits off instead makes every product of positive numbers too small by about 2^-11."""
    problem = Problem("bias of rounding", 4, 256, 40, 40, 256, (3, 3), padding=(1, 1))
    x, w, _, grad_output = (
        None if t is None else t.abs() for t in reference.operands(problem, torch.float32, "cuda")
    )
    tensors = (x, w, None, grad_output)
    actual = run_or_skip(problem, direction, *tensors, precision="tf32", algorithm=algorithm)
    actual = actual.double().cpu()
    expected = reference.compute(problem, direction, *tensors)
    assert ((actual - expected) / expected).mean().abs() < 2.0**-14


def huge(problem: Problem) -> tuple[Tensor, Tensor, None, Tensor]:
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB of GPU memory")
    sizes = (problem.input_size, problem.weight_size, problem.output_size)
    x, w, grad_output = (torch.randn(size, device="cuda") for size in sizes)
    return x, w, None, grad_output


@needs_cuda
@pytest.mark.parametrize("direction", ["forward", "backward_input"])
@pytest.mark.parametrize("problem", HUGE, ids=lambda p: p.name)
def test_more_than_2_to_31_elements(problem: Problem, direction: str) -> None:
    """Images and rows at both ends against the same convolution of only those."""
    x, w, _, grad_output = tensors = huge(problem)
    few = 5  # rows of the output at either end
    outputs, window = grad_output.shape[2], few + problem.kernel[0] - 1
    # Rows of the output, of the input under them, and of those the ones under no others.
    ends = [
        (slice(0, few), slice(0, window), slice(0, few)),
        (slice(outputs - few, outputs), slice(problem.h - window, problem.h), slice(-few, None)),
    ]
    images = [slice(0, 1), slice(problem.n - 1, problem.n)]
    for algorithm, result in results(problem, direction, *tensors):
        for image, (rows, under, alone) in itertools.product(images, ends):
            if direction == "forward":
                actual = result[image, :, rows]
                expected = F.conv2d(x[image, :, under].double(), w.double())
            else:
                actual = result[image, :, under][:, :, alone]
                size, gradient = (1, problem.c, window, problem.w), grad_output[image, :, rows]
                expected = torch.nn.grad.conv2d_input(size, w.double(), gradient.double())
                expected = expected[:, :, alone]
            assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5), algorithm


@needs_cuda
@pytest.mark.parametrize("problem", HUGE, ids=lambda p: p.name)
def test_sums_over_more_than_2_to_31_elements(problem: Problem) -> None:
    x, _, _, grad_output = tensors = huge(problem)
    expected = torch.zeros(problem.weight_size, dtype=torch.float64, device="cuda")
    height, width = grad_output.shape[2:]
    step = max(1, problem.n // 64)  # images that fit into memory twice
    for i in range(0, problem.n, step):
        for o, kh, kw in itertools.product(*map(range, (problem.o, *problem.kernel))):
            products = x[i : i + step, 0, kh : kh + height, kw : kw + width]
            products = products * grad_output[i : i + step, o]
            expected[o, 0, kh, kw] += products.sum(dtype=torch.float64)
    for algorithm, result in results(problem, "backward_weight", *tensors):
        assert torch.allclose(result.double(), expected, rtol=1e-3, atol=10.0), algorithm
