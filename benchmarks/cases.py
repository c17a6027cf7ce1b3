"""What is measured: the problems of tests/problems.py by direction, precision and layout."""

from __future__ import annotations

import fnmatch
import importlib.util
import math
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent

DIRECTIONS = ("forward", "backward_input", "backward_weight")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# "ieee" and "tf32" are two ways to compute with float32 tensors.
DTYPES = {
    "ieee": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


def _load_problems() -> ModuleType:
    """Imports tests/problems.py by its path: `tests` is too common a name to import."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks_problems", ROOT / "tests" / "problems.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def select(patterns: Iterable[str]) -> list[Any]:
    """The problems that any of `patterns` names: a tag (such as KERNELBENCH), a name or a glob.

    Raises:
        ValueError: a pattern names nothing.
    """
    module = _load_problems()
    tags = {
        name: value
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, (list, tuple))
    }
    chosen: dict[str, Any] = {}
    for pattern in patterns:
        found = tags.get(pattern.upper()) or [
            problem
            for name, problem in module.PROBLEMS.items()
            if fnmatch.fnmatchcase(name.lower(), pattern.lower())
        ]
        if not found:
            raise ValueError(
                f"no problem is called {pattern!r}; tags: {', '.join(tags)}; "
                f"names: {', '.join(module.PROBLEMS)}"
            )
        # Where there is no element there is nothing to measure.
        chosen.update((p.name, p) for p in found if 0 not in p.input_size)
    return list(chosen.values())


@dataclass(frozen=True)
class Tensors:
    """The operands of a case, random normal: every direction reads two of the first three."""

    input: Tensor
    weight: Tensor
    grad_output: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    """One convolution to measure."""

    problem: Any  # tests/problems.py: Problem
    direction: str
    precision: str
    layout: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.problem.name} {self.direction} {self.precision} {self.layout}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def float32_precision(self) -> str | None:
        """The `precision` argument of the ops: None where there is only one way to compute."""
        return self.precision if self.dtype == torch.float32 else None

    @property
    def flops(self) -> int:
        p = self.problem
        return 2 * math.prod(p.output_size) * p.taps

    @property
    def bytes(self) -> int:
        """The least a call can move: each operand read once, the result written once."""
        p = self.problem
        elements = sum(math.prod(size) for size in (p.input_size, p.weight_size, p.output_size))
        if p.bias and self.direction == "forward":
            elements += p.o
        return elements * self.dtype.itemsize

    @property
    def shape(self) -> str:
        """The problem for people: 8x64x512x1024 → 128, 3x3, s2 p1."""
        p = self.problem

        def by(numbers: Iterable[int]) -> str:
            return "x".join(map(str, numbers))

        def pair(letter: str, pair: tuple[int, int], default: int) -> str:
            if pair == (default, default):
                return ""
            return f" {letter}{pair[0]}" if pair[0] == pair[1] else f" {letter}{by(pair)}"

        padding = " p=same" if p.padding == "same" else pair("p", p.padding, 0)
        return (
            f"{by(p.input_size)} → {p.o}, {by(p.kernel)}"
            + pair("s", p.stride, 1)
            + padding
            + pair("d", p.dilation, 1)
            + (f" g{p.groups}" if p.groups > 1 else "")
            + (" bias" if p.bias else "")
        )

    @property
    def terms(self) -> int:
        """The number of products summed into one element of the result."""
        p = self.problem
        _, _, oh, ow = p.output_size
        return {
            "forward": p.taps,
            "backward_input": p.o // p.groups * math.prod(p.kernel),
            "backward_weight": p.n * oh * ow,
        }[self.direction]

    def tensors(self) -> Tensors:
        p = self.problem
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(str(self).encode()))

        def normal(*size: int) -> Tensor:
            drawn = torch.promote_types(self.dtype, torch.float32)
            values = torch.randn(size, dtype=drawn, device=self.device, generator=generator)
            layout = LAYOUTS[self.layout] if len(size) == 4 else torch.contiguous_format
            return values.to(self.dtype).contiguous(memory_format=layout)

        return Tensors(
            normal(*p.input_size),
            normal(*p.weight_size),
            normal(*p.output_size),
            normal(p.o) if p.bias and self.direction == "forward" else None,
        )
