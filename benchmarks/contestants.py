"""Who is measured: conv_ops, PyTorch in its two cuDNN modes, and unfold + matmul."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import conv_ops
from benchmarks.cases import Case, Tensors

T = TypeVar("T")

PYTORCH_DEFAULT = "PyTorch default"
PYTORCH_BENCHMARK = "PyTorch benchmark"
UNFOLD = "unfold + matmul"

# PyTorch keeps one cache of cuDNN plans a thread, and cudnn.benchmark is no part of its key: in one
# thread, whichever mode meets a problem first decides for both. So each mode has its own thread.
_THREADS = {mode: ThreadPoolExecutor(1, f"cudnn.benchmark={mode}") for mode in (False, True)}


@dataclass(frozen=True)
class Contestant:
    """A way to compute a case."""

    label: str
    call: Callable[[], Tensor]
    cudnn_benchmark: bool = False

    def run(self, work: Callable[[Callable[[], Tensor]], T]) -> T:
        """Returns `work(self.call)`, done in this contestant's thread, without autograd."""

        def body() -> T:
            torch.backends.cudnn.benchmark = self.cudnn_benchmark
            with torch.no_grad():
                return work(self.call)

        return _THREADS[self.cudnn_benchmark].submit(body).result()


@contextmanager
def torch_precision(precision: str) -> Iterator[None]:
    """Sets how PyTorch computes with float32 on CUDA (never to be mixed with `allow_tf32`)."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    saved = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = saved


def convops(case: Case, t: Tensors, algorithm: str) -> Contestant:
    """conv_ops with a named algorithm, or, for "plan", with the one its plan chooses."""
    p = case.problem
    settings = (
        list(p.stride),
        list(p.padding_sides),
        list(p.dilation),
        p.groups,
        case.float32_precision,
        None if algorithm == "plan" else algorithm,
    )
    ops = torch.ops.convops
    calls: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: ops.conv2d_forward(t.input, t.weight, t.bias, *settings),
        "backward_input": lambda: ops.conv2d_backward_input(
            t.grad_output, t.weight, t.input.shape, *settings
        ),
        "backward_weight": lambda: ops.conv2d_backward_weight(
            t.grad_output, t.input, t.weight.shape, t.weight.stride(), *settings
        ),
    }
    return Contestant(algorithm, calls[case.direction])


def candidates(case: Case, t: Tensors) -> list[dict[str, Any]]:
    """What the plan says of each algorithm: "algorithm", "reason" ("": can run), "chosen", ..."""

    def info(tensor: Tensor) -> tuple[list[int], list[int], str, str, int]:
        dtype = str(tensor.dtype).removeprefix("torch.")
        index = tensor.device.index or 0
        return list(tensor.shape), list(tensor.stride()), dtype, tensor.device.type, index

    p = case.problem
    return conv_ops._C.explain(
        case.direction,
        info(t.input),
        info(t.weight),
        info(t.grad_output),
        t.bias is not None,
        list(p.stride),
        list(p.padding_sides),
        list(p.dilation),
        p.groups,
        case.float32_precision,
    )["candidates"]


def pytorch_call(
    direction: str,
    t: Tensors,
    padding: tuple[int, int, int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Callable[[], Tensor]:
    """The case in PyTorch, computing nothing but the wanted result.

    PyTorch has no asymmetric padding: it pads the input first, and so does this.
    """
    top, bottom, left, right = padding
    symmetric = (min(top, bottom), min(left, right))
    extra = (left - symmetric[1], right - symmetric[1], top - symmetric[0], bottom - symmetric[0])
    settings = (stride, symmetric, dilation)

    if direction == "forward":
        if not any(extra):
            return lambda: F.conv2d(t.input, t.weight, t.bias, *settings, groups)
        return lambda: F.conv2d(F.pad(t.input, extra), t.weight, t.bias, *settings, groups)

    wanted = [direction == "backward_input", direction == "backward_weight", False]
    padded = F.pad(t.input, extra) if any(extra) else t.input

    def backward() -> Tensor:
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            t.grad_output, padded, t.weight, None, *settings, False, [0, 0], groups, wanted
        )
        if direction == "backward_weight":
            return grad_weight
        return F.pad(grad_input, [-e for e in extra]) if any(extra) else grad_input

    return backward


def pytorch(case: Case, t: Tensors) -> list[Contestant]:
    """PyTorch's own convolution: default and, on CUDA, cudnn.benchmark=True."""
    p = case.problem
    call = pytorch_call(case.direction, t, p.padding_sides, p.stride, p.dilation, p.groups)
    default = Contestant(PYTORCH_DEFAULT, call)
    if case.device.type != "cuda":
        return [default]
    return [default, Contestant(PYTORCH_BENCHMARK, call, cudnn_benchmark=True)]


def unfold(case: Case, t: Tensors) -> list[Contestant]:
    """The forward convolution as a user writes it by hand: `F.unfold` and `matmul`, by image."""
    p = case.problem
    top, bottom, left, right = p.padding_sides
    if (top, left) != (bottom, right):
        return []  # F.unfold cannot pad so
    groups = (p.groups,) if p.groups > 1 else ()
    kernels = t.weight.reshape(*groups, p.o // p.groups, -1)

    def call() -> Tensor:
        output = t.input.new_empty(p.output_size)
        for image, result in zip(t.input.split(1), output, strict=True):
            columns = F.unfold(image, p.kernel, p.dilation, (top, left), p.stride)
            columns = columns.view(*groups, kernels.shape[-1], -1)
            torch.matmul(kernels, columns, out=result.view(*groups, kernels.shape[-2], -1))
        return output if t.bias is None else output.add_(t.bias.view(-1, 1, 1))

    return [Contestant(UNFOLD, call)]
