"""What the machine can do at most: memory bandwidth and matrix products, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks.cases import DTYPES, Case
from benchmarks.contestants import torch_precision
from benchmarks.measure import Clock

TF32_THREE_TIMES = "3xtf32"


@dataclass(frozen=True)
class Ceilings:
    """Rates no program exceeds by much.

    Attributes:
        bandwidth: bytes read plus bytes written in a second, of a large copy.
        rates: floating-point operations in a second, by precision, of a large matrix product; and
            "3xtf32", a third of the TF32 rate: what three TF32 products leave for a result of
            float32 accuracy.
    """

    bandwidth: float
    rates: dict[str, float]

    def floor_ms(self, case: Case, rate: str) -> float:
        """The time below which the case cannot be done."""
        return 1e3 * max(case.bytes / self.bandwidth, case.flops / self.rates[rate])

    def memory_bound(self, case: Case, rate: str) -> bool:
        return case.bytes / self.bandwidth >= case.flops / self.rates[rate]


def measure(device: torch.device, precisions: Iterable[str], clock: Clock) -> Ceilings:
    if device.type != "cuda":
        # PyTorch's fp16 product on a CPU is a plain loop: a larger one takes minutes.
        sizes = {p: 512 if p == "fp16" else 2048 for p in precisions}
        rates = {p: _rate(device, size, p, clock) for p, size in sizes.items()}
        return Ceilings(_bandwidth(device, 256 << 20, clock), rates)
    wanted = dict.fromkeys([*precisions, "ieee", "tf32", "bf16"])
    rates = {p: _rate(device, 8192, p, clock) for p in wanted}
    rates[TF32_THREE_TIMES] = rates["tf32"] / 3
    return Ceilings(_bandwidth(device, 2 << 30, clock), rates)


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    """The median of up to 20 calls, as far as a second goes."""
    call()
    samples = [clock.milliseconds(call)]
    end = time.perf_counter() + 1
    while len(samples) < 20 and time.perf_counter() < end:
        samples.append(clock.milliseconds(call))
    return 1e-3 * statistics.median(samples)


def _bandwidth(device: torch.device, size: int, clock: Clock) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), clock)


def _rate(device: torch.device, size: int, precision: str, clock: Clock) -> float:
    a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    with torch_precision(precision):
        return 2 * size**3 / _seconds(lambda: a @ b, clock)
