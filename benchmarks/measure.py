"""How long and how much memory: interleaved timing with cold caches, and peak workspace."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.contestants import Contestant


@dataclass(frozen=True)
class Effort:
    """How many rounds a comparison takes: more while time is left, never fewer than `least`."""

    least: int = 5
    most: int = 100
    seconds: float = 1.0


class Clock(Protocol):
    def milliseconds(self, call: Callable[[], object]) -> float: ...


class CudaClock:
    """Times device work by events, with an L2 that holds nothing of the operands."""

    def __init__(self, device: torch.device) -> None:
        # Writing this much takes longer than the host needs to launch a call, so that the device
        # goes from the one to the other without a gap.
        size = max(512 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._buffer = torch.empty(size, dtype=torch.int8, device=device)

    def milliseconds(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class WallClock:
    """Times by the wall clock, from an idle device to an idle device: host time counts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def milliseconds(self, call: Callable[[], object]) -> float:
        synchronize(self._device)
        start = time.perf_counter()
        result = call()
        synchronize(self._device)
        elapsed = time.perf_counter() - start
        del result  # giving memory back is not part of the call
        return elapsed * 1e3


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else WallClock(device)


def summary(samples: Sequence[float]) -> dict[str, float]:
    return {
        "median_ms": statistics.median(samples),
        "min_ms": min(samples),
        "max_ms": max(samples),
        "rounds": len(samples),
    }


def compare(
    contestants: Sequence[Contestant], clock: Clock, effort: Effort
) -> dict[str, dict[str, float]]:
    """Times the contestants round by round, each round in another order; medians by label."""
    samples: dict[str, list[float]] = {c.label: [] for c in contestants}
    end = time.perf_counter() + effort.seconds
    for i in range(-1, effort.most):  # round -1 warms up and is not counted
        first = i % len(contestants)
        for contestant in [*contestants[first:], *contestants[:first]]:
            milliseconds = contestant.run(clock.milliseconds)
            if i >= 0:
                samples[contestant.label].append(milliseconds)
        if i + 1 >= effort.least and time.perf_counter() > end:
            break
    return {label: summary(values) for label, values in samples.items()}


def first_result(contestant: Contestant, like: Tensor) -> tuple[Tensor, int | None]:
    """The contestant's result, and the bytes it held at its peak beside operands and result.

    Args:
        like: a tensor of the result's shape and type.

    Returns:
        The result, computed after a first call (so that searches and one-time allocations are
        over) into memory full of NaN (so that an element nobody writes is seen), and the peak
        workspace, or None on a CPU, where PyTorch's allocator counts nothing.
    """
    device = like.device

    def work(call: Callable[[], Tensor]) -> tuple[Tensor, int | None]:
        call()
        poison = torch.full_like(like, torch.nan)
        del poison  # the allocator hands its memory to the next tensor of this size
        if device.type != "cuda":
            return call(), None
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.memory_stats(device)["requested_bytes.all.peak"]
        return result, max(0, peak - before - result.untyped_storage().nbytes())

    return contestant.run(work)
