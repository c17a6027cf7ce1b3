"""Which convolutions of a network take how long: both sides' device time, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.contestants import Contestant
from benchmarks.networks import Runner
from conv_ops.explain import examine

# What the profiler calls a convolution forward and its part of the backward pass, of both sides.
_FORWARD = ("aten::conv2d", "convops::conv2d")
_EVALUATE = "autograd::engine::evaluate_function: "
_BACKWARD = (_EVALUATE + "ConvolutionBackward0", _EVALUATE + "ConvopsConv2dForwardBackward")


@dataclass
class Layer:
    """Equal convolutions of a network, in one pass: the sum of their device times.

    On a CPU, which has no device time, it is the host's.
    """

    modules: list[str]
    shape: str
    part: str  # forward or backward
    algorithms: str  # what conv_ops chose
    ours_ms: float = 0.0
    theirs_ms: float = 0.0

    @property
    def loss_ms(self) -> float:
        return self.ours_ms - self.theirs_ms


@dataclass(frozen=True)
class _Call:
    module: str
    shape: str
    algorithms: dict[str, str]  # by part


def compare(ours: tuple[Contestant, Runner], theirs: tuple[Contestant, Runner]) -> list[Layer]:
    """All convolutions of a step by shape and part, the largest loss first."""
    runner = ours[1]
    calls: list[_Call] = []
    hooks = [
        module.register_forward_hook(_recorder(name, runner, calls))
        for name, module in runner.convolutions().items()
    ]
    with torch.no_grad():
        runner.forward()
    for hook in hooks:
        hook.remove()

    layers: dict[tuple[str, str], Layer] = {}
    our_times, their_times = (_times(*side) for side in (ours, theirs))
    for part in our_times:
        for call, our_ms, their_ms in zip(calls, our_times[part], their_times[part], strict=True):
            empty = Layer([], call.shape, part, call.algorithms[part])
            layer = layers.setdefault((call.shape, part), empty)
            layer.modules.append(call.module)
            layer.ours_ms += our_ms
            layer.theirs_ms += their_ms
    return sorted(layers.values(), key=lambda layer: layer.loss_ms, reverse=True)


def _recorder(name: str, runner: Runner, calls: list[_Call]) -> Callable[..., None]:
    """A forward hook that notes a convolution: its shape, and what conv_ops chooses for it."""
    case = runner.case
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32

    def hook(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        def chosen(direction: str) -> str:
            operands = [each if each is None else each.to(dtype) for each in tensors]
            settings = module.stride, module.padding, module.dilation, module.groups
            found = examine(*operands, *settings, direction=direction).chosen
            return found.algorithm if found else "none"

        tensors = inputs[0], module.weight, module.bias
        backward = [chosen("backward_weight")]
        if calls:  # the images have no gradient
            backward.insert(0, chosen("backward_input"))
        algorithms = {"forward": chosen("forward"), "backward": ", ".join(backward)}
        calls.append(_Call(name, _shape(module, inputs[0]), algorithms))

    return hook


def _shape(module: nn.Conv2d, images: Tensor) -> str:
    def by(numbers: tuple[int, ...]) -> str:
        return "x".join(map(str, numbers))

    return (
        f"{by(tuple(images.shape))} → {module.out_channels}, {by(module.kernel_size)}"
        + (f" s{module.stride[0]}" if module.stride[0] > 1 else "")
        + (f" d{module.dilation[0]}" if module.dilation[0] > 1 else "")
        + (f" g{module.groups}" if module.groups > 1 else "")
    )


def _times(contestant: Contestant, runner: Runner) -> dict[str, list[float]]:
    """Milliseconds of each call of a convolution, in the order of the forward pass, by part."""
    device = runner.case.device
    cuda = device.type == "cuda"

    def work(_: Callable[[], object]) -> profile:
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
        with profile(activities=activities) as profiler:
            runner.step()
            measure.synchronize(device)
        return profiler

    events = list(contestant.run(work).events())

    def milliseconds(event: torch.autograd.profiler_util.FunctionEvent) -> float:
        return 1e-3 * (event.device_time_total if cuda else event.cpu_time_total)

    # Under autocast a convolution calls itself, the operands cast.
    forward = [
        event
        for event in events
        if event.name in _FORWARD and not (event.cpu_parent and event.cpu_parent.name in _FORWARD)
    ]
    times = {"forward": [milliseconds(e) for e in sorted(forward, key=_start)]}
    if runner.case.training:
        # A node's number tells when the forward pass made it.
        backward = [event for event in events if event.name in _BACKWARD]
        backward.sort(key=lambda event: event.sequence_nr)
        times["backward"] = [milliseconds(event) for event in backward]
    return times


def _start(event: torch.autograd.profiler_util.FunctionEvent) -> float:
    return event.time_range.start
