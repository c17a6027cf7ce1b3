"""Is it right: relative error against `F.conv2d` in fp64 on the same, already rounded, operands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.cases import Case, Tensors
from benchmarks.contestants import pytorch_call

# The reference is computed by chunks of images, each of about this many bytes of fp64 ...
CHUNK_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
# ... and, past this much work, for some of the chunks only (never for a weight gradient, which
# needs all images).
MOST_FLOPS = 8e12

UNIT_ROUNDOFF = {"ieee": 2**-24, "tf32": 2**-11, "fp16": 2**-11, "bf16": 2**-8, "fp64": 2**-53}


def bound(case: Case) -> float:
    """The relative error above which a result is called wrong.

    Twice the rounding of the operands (tf32) or of the result (the others), and the random walk of
    an accumulation in fp32 (fp64: in fp64). Tests have tighter bounds; this one finds wrong code.
    """
    accumulation = 2**-53 if case.precision == "fp64" else 2**-24
    return 2 * UNIT_ROUNDOFF[case.precision] + 2 * math.sqrt(case.terms) * accumulation


@contextmanager
def without_cudnn() -> Iterator[None]:
    """PyTorch's own convolution: it owes the rival nothing, and in fp64 its speed is steady."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def errors(case: Case, t: Tensors, outputs: dict[str, Tensor]) -> tuple[dict[str, float], int]:
    """The relative Frobenius error of each output, and the number of images it was computed on."""
    p = case.problem
    image_bytes = 8 * (t.input[0].numel() + t.grad_output[0].numel())
    size = max(1, min(p.n, CHUNK_BYTES[case.device.type] // image_bytes))
    starts = list(range(0, p.n, size))
    most = max(1, int(MOST_FLOPS / case.flops * len(starts)))
    if len(starts) > most and case.direction != "backward_weight":
        starts = [starts[round(i * (len(starts) - 1) / max(1, most - 1))] for i in range(most)]

    def fp64(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float64, memory_format=torch.contiguous_format)

    weight = fp64(t.weight)
    bias = None if t.bias is None else t.bias.double()
    grad_weight = torch.zeros_like(weight)
    squares = torch.zeros(len(outputs) + 1, dtype=torch.float64, device=case.device)
    images = 0

    def accumulate(expected: Tensor, actual: list[Tensor]) -> None:
        for i, values in enumerate([torch.zeros_like(expected), *actual]):
            squares[i] += (values.double() - expected).square_().sum()

    for start in starts:
        part = slice(start, start + size)
        chunk = Tensors(fp64(t.input[part]), weight, fp64(t.grad_output[part]), bias)
        settings = (p.padding_sides, p.stride, p.dilation, p.groups)
        with without_cudnn():
            expected = pytorch_call(case.direction, chunk, *settings)()
        images += len(chunk.input)
        if case.direction == "backward_weight":
            grad_weight += expected
        else:
            accumulate(expected, [output[part] for output in outputs.values()])
    if case.direction == "backward_weight":
        accumulate(grad_weight, list(outputs.values()))

    norm, *differences = squares.sqrt().tolist()
    return {label: d / norm for label, d in zip(outputs, differences, strict=True)}, images
