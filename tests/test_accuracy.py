"""Every algorithm on data of every kind, element by element against what an fp32 FMA loop needs.

A result may miss fp64's by

    c · u · sqrt(K) · Σ|x||w|  +  2^-24 · |result|  +  K · 2^-150

K: products summed; u: 2^-24 (ieee) or 2^-11 (tf32); c: twice FMA_LOOP. The first term is twice what
a plain loop of fp32 fused multiply-adds needs, the second is the last rounding, the third what
roundings to subnormal sums add. `python tests/test_fma_loop.py` prints where FMA_LOOP comes from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import reference
import torch
from problems import SEEDS, Problem
from test_conv2d import results, run_or_skip
from torch import Tensor

# What a loop of fp32 fused multiply-adds needs: the largest ratio of all DATA on all PROBLEMS in
# both DIRECTIONS, 1.753 (narrow, forward, channels; the next is 1.418: dense, backward_input,
# lognormal), printed by `python tests/test_fma_loop.py`. Twice this is enough for perfect TF32 at
# every K: it needs 2 / sqrt(K), as each operand moves by a factor of 1 +- u at most.
FMA_LOOP = 1.76

IEEE_ROUNDOFF = reference.SUM_ROUNDOFF[torch.float32]
SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal
# From here on the nearest float32 is infinity.
ROUNDS_TO_INFINITY = 2.0**128 - 2.0**103

PROBLEMS = [
    Problem("dense", 2, 32, 20, 27, 40, (3, 3), padding=(1, 1)),
    Problem("pointwise", 2, 64, 15, 14, 48, (1, 1)),
    Problem("strided", 2, 24, 23, 22, 17, (5, 3), (2, 2), (2, 1)),
    Problem("few_channels", 2, 3, 41, 38, 16, (7, 7), (2, 2), (3, 3)),
    Problem("dilated", 2, 16, 19, 21, 24, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Problem("deep", 1, 256, 9, 8, 24, (3, 3), padding=(1, 1)),
    Problem("narrow", 2, 24, 13, 29, 26, (1, 1)),
    Problem("shallow", 2, 4, 9, 20, 6, (1, 1)),
    Problem("grouped", 2, 24, 12, 11, 36, (3, 3), padding=(1, 1), groups=3),
    Problem("grouped_strided", 2, 12, 13, 16, 12, (3, 3), (2, 2), (1, 1), groups=3),
    Problem("grouped_pointwise", 2, 12, 9, 9, 8, (1, 1), groups=4),
    Problem("depthwise", 2, 8, 15, 14, 8, (3, 3), padding=(1, 1), groups=8),
]
SPECIAL_NAMES = ("dense", "pointwise", "strided", "grouped", "grouped_strided", "depthwise")
SPECIAL_PROBLEMS = [p for p in PROBLEMS if p.name in SPECIAL_NAMES]
DIRECTIONS = ["forward", "backward_input"]
PRECISIONS = {"cpu": ["ieee"], "cuda": ["ieee", "tf32"]}  # the CPU computes both as ieee
# Relative, of normal data. Operands rounded to TF32 and nothing else make 2.91e-4 to 2.97e-4 of it.
FROBENIUS_ERROR = {"ieee": 8e-7, "tf32": 3e-4}
# One chain of K fp32 sums, as fma_loop's, errs by 0.30 u sqrt(K), past 8e-7 from K = 2000 on. So do
# these, by their definition and by cuBLAS's (cuDNN too: 8.5e-7 for kb56 forward).
CHAINS = {"direct", "im2col_gemm"}
CHAIN_ERROR = 0.31
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)

# Uniform between -1 and 1, of these sizes.
Draw = Callable[..., Tensor]


def powers_of_ten(draw: Draw, exponent: float, *size: int) -> Tensor:
    return 10.0 ** (exponent * draw(*size))


def channels(draw: Draw, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x * powers_of_ten(draw, 3, *x.shape[1:3], 1, 1), w


def inverse_channels(draw: Draw, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    scale = powers_of_ten(draw, 3, *x.shape[1:3], 1, 1)
    return x * scale, w / scale[:, None]


def with_one(tensor: Tensor, value: float) -> Tensor:
    """The tensor with another value in its middle."""
    tensor = tensor.contiguous()
    tensor.view(-1)[tensor.numel() // 2 + 3] = value
    return tensor


def loud_image(draw: Draw, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x[-1] *= 1e6
    return x, w


def silent_parts(draw: Draw, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x[:, :, 1::2] = 0
    x[..., x.shape[-2] // 2 :, :] = 0
    x[-1, ..., x.shape[-1] // 3 :] = 0
    return x, w


def quiet_channel(draw: Draw, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The weight is zero but for the quiet channel."""
    channel = x.shape[2] // 2
    x[:, :, channel] *= 1e-9
    w[:, :, :channel] = 0
    w[:, :, channel + 1 :] = 0
    return x, w


def quiet_half(draw: Draw, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x[:1, ..., x.shape[-2] // 2 :, :] *= 1e-12
    x[1:, ..., : x.shape[-1] // 2] *= 1e-12
    return x, w


def fading(size: int, depth: int) -> Tensor:
    """Powers of two between 1 and 2^(1 - depth), loud beside quiet."""
    return 2.0 ** -(torch.arange(size, dtype=torch.float64) * 11 % depth)


def one_binade(draw: Draw, x: Tensor) -> Tensor:
    """Numbers between 1 and 2: the exponents are those that somebody multiplies by."""
    return x.sign() * (1 + draw(*x.shape).abs())


def fading_channels(depth: int, draw: Draw, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of the weight shows one channel alone, loud or quiet."""
    sums, rows = x.shape[2], w.shape[1]
    shown = torch.arange(rows)[:, None] * 7 % sums == torch.arange(sums)
    return one_binade(draw, x) * fading(sums, depth)[:, None, None], w * shown[:, :, None, None]


def fading_weights(depth: int, draw: Draw, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Each column of the input shows one channel of the weight alone, loud or quiet."""
    sums, width = x.shape[2], x.shape[-1]
    shown = torch.arange(sums)[:, None] == torch.arange(width) * 7 % sums
    return x * shown[:, None], one_binade(draw, w) * fading(sums, depth)[:, None, None]


def fading_columns(depth: int, draw: Draw, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return one_binade(draw, x) * fading(x.shape[-1], depth), w


# What two 11-bit parts miss by most, and always in the same direction: the lower one is 2^-11 less
# three bits, which has 12 bits and is cut, and the square of it is what three products leave out.
TWO_PARTS_MISS = 1 + 2.0**-11 - 3 * 2.0**-23

# From normal x (image, group, channel summed over, h, w) and w (group, channel of the result,
# channel summed over, h, w), the weight divided by sqrt(K), to the data; they are rounded last.
DATA: dict[str, Callable[[Draw, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "normal": lambda draw, x, w: (x, w),
    "uniform": lambda draw, x, w: (draw(*x.shape).abs(), w),
    "positive": lambda draw, x, w: (draw(*x.shape).abs(), draw(*w.shape).abs()),
    "relu": lambda draw, x, w: (x.relu(), w),
    "times_1e30": lambda draw, x, w: (x * 1e30, w),
    "times_1e-30": lambda draw, x, w: (x * 1e-30, w),
    "lognormal": lambda draw, x, w: (x.sign() * (3 * torch.randn_like(x)).exp(), w),
    "channels": channels,
    "inverse_channels": inverse_channels,
    "one_1e9": lambda draw, x, w: (with_one(x, 1e9), w),
    "loud_image": loud_image,
    "zeros": lambda draw, x, w: (x * 0, w),
    "silent_parts": silent_parts,
    # Of the operand, of the products, and of a weight whose results are ordinary again.
    "subnormal": lambda draw, x, w: (x * 1e-40, w),
    "subnormal_products": lambda draw, x, w: (x * 1e-20, w * 1e-20),
    "subnormal_weight": lambda draw, x, w: (x * 1e30, w * 1e-40),
    # About half of the sums are too large for float32.
    "overflow": lambda draw, x, w: (
        draw(*x.shape).abs() * 3e38,
        w.abs() * 2.8 / math.sqrt(w[0, 0].numel()),
    ),
    "quiet_channel": quiet_channel,
    "quiet_half": quiet_half,
    "weight_1e9": lambda draw, x, w: (x, with_one(w, 1e9)),
    "weight_rows": lambda draw, x, w: (x, w * powers_of_ten(draw, 6, *w.shape[:2], 1, 1, 1)),
    # What is split or scaled in blocks gives up somewhere between these ranges of one block.
    **{
        f"{kind.__name__}_{depth}": partial(kind, depth)
        for kind in (fading_channels, fading_weights, fading_columns)
        for depth in (15, 20, 21, 25)
    },
    "two_parts_miss": lambda draw, x, w: (
        torch.full_like(x, TWO_PARTS_MISS),
        torch.full_like(w, TWO_PARTS_MISS / 16),
    ),
}
each_data = pytest.mark.parametrize("data", DATA)


def length(problem: Problem, direction: str) -> int:
    """How many products a result sums."""
    if direction == "forward":
        return problem.taps
    return problem.o // problem.groups * math.prod(problem.kernel)


def operands(problem: Problem, direction: str, data: str) -> tuple[Tensor, Tensor]:
    """The tensor convolved (the input or grad_output) and the weight, float32 on the CPU."""
    torch.manual_seed(0)
    size, groups = problem.input_size, problem.groups
    w = torch.randn(groups, problem.o // groups, *problem.weight_size[1:], dtype=torch.float64)
    if direction == "backward_input":
        size, w = problem.output_size, w.transpose(1, 2)
    x = torch.randn(size[0], groups, size[1] // groups, *size[2:], dtype=torch.float64)

    def draw(*size: int) -> Tensor:
        return 2 * torch.rand(*size, dtype=torch.float64) - 1

    x, w = DATA[data](draw, x, w / math.sqrt(length(problem, direction)))
    if direction == "backward_input":
        w = w.transpose(1, 2)
    return x.reshape(size).float(), w.reshape(problem.weight_size).float().contiguous()


def convolve(problem: Problem, direction: str, x: Tensor, w: Tensor) -> Tensor:
    """In float64 on the CPU."""
    if direction == "forward":
        return reference.forward(problem, x, w, None)
    return reference.backward_input(problem, x, w)


# On the CPU the layout changes no arithmetic.
LAYOUTS = {
    "cpu": (torch.contiguous_format,),
    "cuda": (torch.contiguous_format, torch.channels_last),
}


def calls(
    problem: Problem, direction: str, x: Tensor, w: Tensor, precision: str
) -> Iterator[tuple[str, Tensor]]:
    """`results` in every layout, on the CPU."""
    for layout in LAYOUTS[x.device.type]:
        moved = [t.contiguous(memory_format=layout) for t in (x, w)]
        for algorithm, result in results(
            problem, direction, *moved, None, moved[0], precision=precision
        ):
            yield algorithm, result.cpu()


class Case(NamedTuple):
    """What a result is held against."""

    x: Tensor
    w: Tensor
    expected: Tensor
    magnitude: Tensor
    length: int


def make_case(problem: Problem, direction: str, x: Tensor, w: Tensor) -> Case:
    return Case(
        x,
        w,
        convolve(problem, direction, x, w),
        convolve(problem, direction, x.abs(), w.abs()),
        length(problem, direction),
    )


@lru_cache(maxsize=4)
def case_of(problem: Problem, direction: str, data: str) -> Case:
    return make_case(problem, direction, *operands(problem, direction, data))


def tf32_magnitude(problem: Problem, direction: str, case: Case) -> Tensor:
    """The magnitude with subnormal operands raised: TF32 has fewer bits of those."""
    x, w = (
        torch.where(t == 0, 0.0, t.double().abs().clamp(min=SMALLEST_NORMAL))
        for t in (case.x, case.w)
    )
    return convolve(problem, direction, x, w)


def roundings(case: Case) -> Tensor:
    """What the last rounding takes, and the sums' where they are subnormal."""
    subnormal = case.length * SMALLEST_NORMAL * IEEE_ROUNDOFF
    return IEEE_ROUNDOFF * 1.01 * case.expected.abs() + subnormal * (case.magnitude > 0)


def allowed(problem: Problem, direction: str, case: Case, precision: str) -> Tensor:
    """How far each element of a result may be off."""
    roundoff, magnitude = IEEE_ROUNDOFF, case.magnitude
    if precision == "tf32":
        roundoff = reference.TF32_ROUNDOFF
        magnitude = tf32_magnitude(problem, direction, case)
    return 2 * FMA_LOOP * math.sqrt(case.length) * roundoff * magnitude + roundings(case)


def check(actual: Tensor, case: Case, bound: Tensor, algorithm: str) -> None:
    """Holds a result against fp64: finite elements within the bound, NaN and Inf in place."""
    actual, expected = actual.double(), case.expected
    assert actual.shape == expected.shape
    error = (actual - expected).abs()
    too_large = actual == expected.sign() * math.inf
    right = torch.where(
        expected.isfinite(),
        (error <= bound) | (too_large & (expected.abs() + bound >= ROUNDS_TO_INFINITY)),
        (actual == expected) | (actual.isnan() & expected.isnan()),
    )
    if right.all():
        return
    wrong = torch.where(right, -1.0, (error / bound).nan_to_num(nan=math.inf))
    index = int(wrong.argmax())
    raise AssertionError(
        f"{algorithm}: {int((~right).sum())} of {right.numel()} elements are wrong; number {index} "
        f"is {actual.flatten()[index].item()}, expected {expected.flatten()[index].item()}: "
        f"{wrong.flatten()[index].item():.3g} times the bound {bound.flatten()[index].item():.3g}"
    )


@each_data
@each_direction
@each_problem
def test_every_kind_of_data(problem: Problem, data: str, direction: str, device: str) -> None:
    case = case_of(problem, direction, data)
    x, w = case.x.to(device), case.w.to(device)
    for precision in PRECISIONS[device]:
        bound = allowed(problem, direction, case, precision)
        for algorithm, result in calls(problem, direction, x, w, precision):
            check(result, case, bound, algorithm)


def louder_and_louder(tensor: Tensor) -> Tensor:
    """The tensor with its first channel a thousandth as loud, and its last a thousand times."""
    return tensor * 10 ** torch.linspace(-3, 3, tensor.shape[1])[:, None, None]


# What is done to the input and grad_output, both normal.
WEIGHT_DATA: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "normal": lambda x, dy: (x, dy),
    "positive": lambda x, dy: (x.abs(), dy.abs()),
    "relu": lambda x, dy: (x.clamp(min=0), dy),
    "large_and_small": lambda x, dy: (x * 1e30, dy * 1e-30),
    # Whose products are ordinary numbers, but not those of what fp16 resolves of each.
    "both_small": lambda x, dy: (x * 2.0**-62, dy * 2.0**-60),
    "lognormal": lambda x, dy: (x.sign() * (3 * torch.randn_like(x)).exp(), dy),
    "channels": lambda x, dy: (x * 10 ** torch.linspace(-3, 3, x.shape[1])[:, None, None], dy),
    "grad_channels": lambda x, dy: (
        x,
        dy * 10 ** torch.linspace(-3, 3, dy.shape[1])[:, None, None],
    ),
    "one_1e9": lambda x, dy: (with_one(x, 1e9), dy),
    "grad_one_1e9": lambda x, dy: (x, with_one(dy, 1e9)),
    "loud_image": lambda x, dy: (x * torch.tensor([1e6, 1])[:, None, None, None], dy),
    "zeros": lambda x, dy: (x * 0, dy),
}


@pytest.mark.parametrize("data", WEIGHT_DATA)
@pytest.mark.parametrize(
    "problem",
    [
        Problem("dense", 2, 24, 16, 100, 40, (3, 3), padding=(1, 1)),
        Problem("dilated", 2, 20, 22, 44, 72, (5, 7), padding=(4, 3), dilation=(2, 1)),
        Problem("grouped", 2, 32, 12, 30, 48, (3, 3), groups=2),
        Problem("pointwise", 2, 72, 12, 30, 136, (1, 1)),
        Problem("strided", 2, 5, 37, 61, 40, (7, 7), (2, 2), (3, 3)),
        Problem("narrow", 2, 20, 18, 14, 72, (3, 3), padding=(1, 1)),
        Problem("narrow_odd", 2, 20, 23, 27, 40, (3, 5), padding=(1, 2)),
    ],
    ids=lambda p: p.name,
)
def test_weight_gradient_of_every_kind_of_data(problem: Problem, data: str, device: str) -> None:
    torch.manual_seed(0)
    x, dy = WEIGHT_DATA[data](torch.randn(problem.input_size), torch.randn(problem.output_size))
    expected = reference.backward_weight(problem, dy.double(), x.double())
    magnitude = reference.backward_weight(problem, dy.abs().double(), x.abs().double())
    terms = problem.n * math.prod(problem.output_size[2:])
    case = Case(x, dy, expected, magnitude, terms)
    w = torch.empty(problem.weight_size, device=device)
    for precision, layout in itertools.product(PRECISIONS[device], LAYOUTS[device]):
        roundoff = IEEE_ROUNDOFF if precision == "ieee" else reference.TF32_ROUNDOFF
        bound = 2 * FMA_LOOP * math.sqrt(terms) * roundoff * magnitude + roundings(case)
        moved = [t.to(device).contiguous(memory_format=layout) for t in (x, w, dy)]
        tensors = (moved[0], moved[1], None, moved[2])
        for algorithm, result in results(problem, "backward_weight", *tensors, precision=precision):
            check(result.cpu(), case, bound, algorithm)


@lru_cache(maxsize=4)
def special_case(
    problem: Problem, direction: str, operand: str, values: tuple[float, ...], place: float
) -> Case:
    """Half of the input is zero: there NaN comes of an infinite weight."""
    tensors = dict(zip(("input", "weight"), operands(problem, direction, "relu"), strict=True))
    for name, tensor in tensors.items():
        if operand in (name, "both"):
            begin = int(place * (tensor.numel() - len(values)))
            tensor.view(-1)[begin : begin + len(values)] = torch.tensor(values)
    return make_case(problem, direction, *tensors.values())


@pytest.mark.parametrize("place", [0.0, 0.55, 1.0], ids=["first", "inside", "last"])
@pytest.mark.parametrize(
    "values",
    [(math.nan,), (math.inf,), (-math.inf,), (math.inf, -math.inf)],
    ids=["nan", "inf", "minus_inf", "inf_and_minus_inf"],
)
@pytest.mark.parametrize("operand", ["input", "weight", "both"])
@each_direction
@pytest.mark.parametrize("problem", SPECIAL_PROBLEMS, ids=lambda p: p.name)
def test_nan_and_inf_are_where_fp64_has_them(
    problem: Problem,
    direction: str,
    operand: str,
    values: tuple[float, ...],
    place: float,
    device: str,
) -> None:
    """Signs included; all other elements are as accurate as ever."""
    case = special_case(problem, direction, operand, values, place)
    x, w = case.x.to(device), case.w.to(device)
    for precision in PRECISIONS[device]:
        bound = allowed(problem, direction, case, precision)
        for algorithm, result in calls(problem, direction, x, w, precision):
            check(result, case, bound, algorithm)


@lru_cache(maxsize=2)
def normal_case(problem: Problem, direction: str) -> tuple[Tensor, Tensor, Tensor]:
    x, w = operands(problem, direction, "normal")
    return x, w, convolve(problem, direction, x, w)


@pytest.mark.parametrize("elements", [100_000, 2_000_000])
@each_direction
@pytest.mark.parametrize("problem", SEEDS, ids=lambda p: p.name)
def test_frobenius_error_of_normal_data(
    problem: Problem, direction: str, elements: int, device: str
) -> None:
    if device == "cpu" and elements > 100_000:
        pytest.skip("takes too long on the CPU")
    problem = problem.scaled(elements)
    x, w, expected = normal_case(problem, direction)
    x, w = x.to(device), w.to(device)
    for precision in PRECISIONS[device]:
        for algorithm, result in calls(problem, direction, x, w, precision):
            error = float((result.double() - expected).norm() / expected.norm())
            most = FROBENIUS_ERROR[precision]
            if algorithm in CHAINS:
                chain = CHAIN_ERROR * IEEE_ROUNDOFF * math.sqrt(length(problem, direction))
                most = max(most, chain)
            assert error <= most, algorithm


@pytest.mark.parametrize("precision", PRECISIONS["cuda"])
@each_direction
def test_every_element_of_a_long_run(direction: str, precision: str, device: str) -> None:
    """Hundreds of tiles for each multiprocessor: warps that hand on data must not overtake it."""
    if device == "cpu":
        pytest.skip("the CPU has no such hands")
    torch.manual_seed(0)
    problem = Problem("long", 6, 64, 1024, 1024, 128, (1, 1))
    size = problem.input_size if direction == "forward" else problem.output_size
    x = torch.randn(size, device=device)
    w = torch.randn(problem.weight_size, device=device)
    options = {"precision": precision, "algorithm": "implicit_gemm"}
    result = run_or_skip(problem, direction, x, w, None, x, **options)
    matrix = w[:, :, 0, 0].double()
    if direction == "backward_input":
        matrix = matrix.T
    roundoff = IEEE_ROUNDOFF if precision == "ieee" else reference.TF32_ROUNDOFF
    for image, actual in zip(x.flatten(2), result.flatten(2), strict=True):
        expected, magnitude = matrix @ image.double(), matrix.abs() @ image.double().abs()
        allowed = 2 * FMA_LOOP * math.sqrt(matrix.shape[1]) * roundoff * magnitude
        wrong = (actual - expected).abs() > allowed
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements are wrong"
