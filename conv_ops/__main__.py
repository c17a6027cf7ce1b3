"""``python -m conv_ops``: what is installed, what it runs on, and whether its results are right."""

import argparse
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import conv_ops
from conv_ops import _C
from conv_ops.explain import examine

# Sizes of input and weight, and the arguments. Heights differ from widths, so that an exchange of
# the two is noticed.
_CASES: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 3, 9, 7), (4, 3, 3, 3), {"padding": 1}),
    ((2, 8, 5, 6), (4, 8, 1, 1), {}),
    ((2, 4, 11, 9), (6, 2, 3, 5), {"stride": (2, 3), "padding": (1, 2), "groups": 2}),
    ((2, 6, 8, 9), (6, 1, 2, 4), {"padding": "same", "dilation": (2, 1), "groups": 6}),
    ((2, 6, 9, 8), (6, 1, 3, 3), {"padding": 1, "groups": 6}),
)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def main() -> int:
    """Prints the report and returns the exit code: 1 if the self-check fails, else 0."""
    argparse.ArgumentParser(prog="python -m conv_ops", description=__doc__).parse_args()
    for title, lines in (
        ("versions", _versions()),
        ("libraries", _libraries()),
        ("devices", _devices()),
        ("settings", _settings()),
        ("algorithms, in order of preference", _algorithms()),
    ):
        print(title, *lines, sep="\n  ")
    warnings.filterwarnings("ignore", "Using padding='same'")  # torch about its own copy
    print("self-check: forward and backward against torch in float64")
    failed = False
    for device in _checked_devices():
        for algorithm in _algorithms_of(device):
            for dtype in _DTYPES:
                outcome = _check(device, algorithm, dtype)
                failed |= outcome.startswith("FAILED")
                name = f"{device} {algorithm} {str(dtype).removeprefix('torch.')}"
                print(f"  {name:40} {outcome}", flush=True)
    return int(failed)


def _versions() -> Iterator[str]:
    built = ", ".join(f"{name} {value}" for name, value in _C.build_info().items())
    yield f"conv_ops {conv_ops.__version__} in {os.path.dirname(conv_ops.__file__)}"
    yield f"built with: {built}"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield f"Python {platform.python_version()}, {platform.platform()}"


def _libraries() -> Iterator[str]:
    for library in conv_ops.libraries:
        note = f": {library.note}" if library.note else ""
        yield f"{library.name} {'loaded' if library.loaded else 'not loaded'}{note}"


def _devices() -> Iterator[str]:
    yield f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability, memory = f"{found.major}.{found.minor}", found.total_memory / 2**30
        yield f"cuda:{index}: {found.name}, capability {capability}, {memory:.0f} GiB"
    if build := _C.cuda_build_info():
        built = ", ".join(build["architectures"])
        yield f"built for CUDA {build['cuda_version']}, architectures {built}"
    else:
        yield "CUDA kernels: none loaded"


def _settings() -> Iterator[str]:
    for name, value in vars(conv_ops.settings.get()).items():
        yield f"{name}: {value}"
    if conv_ops.settings.get().precision is None:
        yield f"PyTorch's precision of float32 on CUDA: {conv_ops.settings.torch_precision()}"
    yield f"file of tuned choices: {conv_ops.tuning.cache_file()}"


def _algorithms() -> Iterator[str]:
    for device in ("cpu", "cuda"):
        yield f"{device}: {', '.join(_algorithms_of(device)) or 'none'}"


def _algorithms_of(device: str) -> list[str]:
    kind = device.split(":")[0]
    return [each["name"] for each in _C.algorithms() if each["device"] == kind]


def _checked_devices() -> list[str]:
    gpus = torch.cuda.device_count() if _C.cuda_build_info() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(gpus))]


def _check(device: str, algorithm: str, dtype: torch.dtype) -> str:
    """Runs all cases that the algorithm takes; returns what is to be said about them."""
    errors = []
    try:
        for sizes, weight_sizes, arguments in _CASES:
            case = (device, algorithm, dtype, sizes, weight_sizes, arguments)
            if "forward" in (directions := _directions(*case)):
                errors += _errors(*case, directions)
    except Exception as error:  # whatever it is, the report goes on
        return f"FAILED: {error}"
    if not errors:
        return "takes none of the cases"
    bound = 8 * torch.finfo(dtype).eps
    wrong = [error for error in errors if not error <= bound]  # NaN is wrong too
    verdict, worst = ("FAILED", wrong[0]) if wrong else ("ok", max(errors))
    return f"{verdict}, relative error {worst:.1e} (bound {bound:.1e})"


def _directions(
    device: str,
    algorithm: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    weight_sizes: tuple[int, ...],
    arguments: dict[str, Any],
) -> list[str]:
    """The directions that the algorithm takes the case in."""
    input = torch.empty(sizes, dtype=dtype, device=device)
    weight = torch.empty(weight_sizes, dtype=dtype, device=device)
    return [
        direction
        for direction in ("forward", "backward_input", "backward_weight")
        for candidate in examine(
            input, weight, **arguments, direction=direction, precision="ieee"
        ).candidates
        if candidate.algorithm == algorithm and candidate.can_run
    ]


def _errors(
    device: str,
    algorithm: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    weight_sizes: tuple[int, ...],
    arguments: dict[str, Any],
    directions: list[str],
) -> list[float]:
    """The largest errors of output and gradients, each relative to the largest value."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    operands = [random(*sizes), random(*weight_sizes), random(weight_sizes[0])]
    wanted = ["backward_input" in directions, "backward_weight" in directions, True]  # and bias
    exact = [
        each.double().requires_grad_(want) for each, want in zip(operands, wanted, strict=True)
    ]
    ours = [
        each.to(device).requires_grad_(want) for each, want in zip(operands, wanted, strict=True)
    ]
    expected = F.conv2d(*exact, **arguments)
    actual = conv_ops.conv2d(*ours, **arguments, precision="ieee", algorithm=algorithm)
    upstream = random(*expected.shape)
    results = [actual, *_gradients(actual, ours, upstream.to(device))]
    references = [expected, *_gradients(expected, exact, upstream.double())]
    return [
        ((result.double().cpu() - reference).abs().max() / reference.abs().max()).item()
        for result, reference in zip(results, references, strict=True)
    ]


def _gradients(output: Tensor, operands: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, [each for each in operands if each.requires_grad], upstream)


if __name__ == "__main__":
    sys.exit(main())
