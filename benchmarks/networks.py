"""The networks that `networks` measures, and one of them made ready to run a case."""

from __future__ import annotations

import copy
import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import conv_ops
from benchmarks.cases import LAYOUTS
from benchmarks.contestants import torch_precision

UNET = "unet"
NETWORKS = ("resnet50", "convnext_tiny", "efficientnet_b0", UNET, "resnext50_32x4d")

WORKS = ("inference", "training")
EXECUTIONS = ("eager", "compile")
# bf16 is autocast: float32 parameters and images, cast where PyTorch's autocast casts.
PRECISIONS = ("ieee", "tf32", "bf16")

# Steps so small that the parameters stay where they are, however many are measured.
_LEARNING_RATE = 1e-9
_MOMENTUM = 0.9


@dataclass(frozen=True)
class NetworkCase:
    """One network's work to measure: a forward pass, or a step of training."""

    network: str
    work: str
    batch: int
    precision: str
    layout: str
    execution: str
    size: int
    device: torch.device

    def __str__(self) -> str:
        words = self.network, self.work, f"batch {self.batch}", self.precision, self.layout
        return " ".join([*words, *[self.execution] * (self.execution != "eager")])

    @property
    def training(self) -> bool:
        return self.work == "training"


class UNet(nn.Module):
    """Ronneberger's U-Net, padded, with batch normalization and upsampling by repetition."""

    def __init__(self, width: int = 32, depth: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        pairs = list(itertools.pairwise(widths))
        self.first = _convolutions(3, width)
        self.down = nn.ModuleList(_convolutions(above, below) for above, below in pairs)
        self.up = nn.ModuleList(
            _convolutions(above + below, above) for above, below in reversed(pairs)
        )
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = [self.first(images)]
        for block in self.down:
            features.append(block(self.pool(features[-1])))
        result = features.pop()
        for block in self.up:
            larger = nn.functional.interpolate(result, scale_factor=2.0)
            result = block(torch.cat([features.pop(), larger], 1))
        return self.last(result)


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def build(name: str, device: torch.device, size: int) -> nn.Module:
    """A network with random parameters of a fixed seed, in which every layer matters.

    Args:
        name: "unet", a model of torchvision, or else one of timm.

    Raises:
        ValueError: neither library has it.
    """
    torch.manual_seed(0)
    model = (UNet() if name == UNET else _library_model(name)).to(device)
    for module in model.modules():
        # Chance would not strike float64 as it strikes float32: no dropout, no stochastic depth.
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    for parameter_name, parameter in model.named_parameters():
        # ConvNeXt begins with 1e-6: nothing would be seen of its convolutions in the output.
        if parameter_name.endswith("layer_scale"):
            nn.init.constant_(parameter, 0.1)
    _calibrate(model, size, device)
    return model


def smoothed(model: nn.Module, device: torch.device, size: int) -> nn.Module:
    """A copy with the same convolutions whose gradients can be compared.

    Where a rounding turns a ReLU on or off, or another element becomes a maximum, gradients jump:
    by a thousandth and more in float32. So there are SiLUs for ReLUs, means for maxima.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                pool = _MeanPool(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(parent, name, pool)
    _calibrate(model, size, device)
    return model


class _MeanPool(nn.AvgPool2d):
    def forward(self, images: Tensor) -> Tensor:
        # NCHW: in channels_last both sides' gradients were off by their own length on an H200.
        return super().forward(images.contiguous())


def _library_model(name: str) -> nn.Module:
    try:
        from torchvision import models

        if name in models.list_models():
            return models.get_model(name, weights=None)
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} is a network of torchvision or timm: {error}") from error
    if not timm.is_model(name):
        raise ValueError(f"no network is called {name!r}: not {UNET}, nor in torchvision or timm")
    return timm.create_model(name)


def _calibrate(model: nn.Module, size: int, device: torch.device) -> None:
    """Sets batch normalization to what it sees; else evaluation lets random networks vanish."""
    images = torch.randn(8, 3, size, size, device=device)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all passes, of which there is one
    with torch.no_grad(), torch_precision("ieee"):
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class Runner:
    """A copy of a network, ready to do a case's work.

    Args:
        model: the network, which stays as it is.
        converted: whether conv_ops computes its convolutions.
        exact: in float64 and contiguous, whatever the case says.
    """

    def __init__(
        self, model: nn.Module, case: NetworkCase, converted: bool = False, exact: bool = False
    ) -> None:
        self.case = case
        layout = torch.contiguous_format if exact else LAYOUTS[case.layout]
        dtype = torch.float64 if exact else torch.float32
        self.model = copy.deepcopy(model).to(dtype=dtype, memory_format=layout)
        self.model.train(case.training)
        if converted:
            conv_ops.convert_conv2d(self.model)
        self._autocast = case.precision == "bf16" and not exact
        compiled = case.execution == "compile" and not exact
        self._forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self._optimizer = torch.optim.SGD(self.model.parameters(), _LEARNING_RATE, _MOMENTUM)

        generator = torch.Generator(case.device).manual_seed(case.batch)
        shape = case.batch, 3, case.size, case.size
        images = torch.randn(shape, device=case.device, generator=generator)
        self._images = images.to(dtype).contiguous(memory_format=layout)

    def forward(self) -> Tensor:
        with self._maybe_autocast():
            return self._forward(self._images)

    def step(self, update: bool = True) -> Tensor:
        """Does the work once and returns the network's output.

        Args:
            update: whether training moves the parameters; their gradients are left either way.
        """
        if not self.case.training:
            return self.forward()
        # Backward in this thread: PyTorch's cuDNN plans are one cache a thread (contestants.py).
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            self._optimizer.zero_grad()
            output = self.forward()
            output.to(self._images.dtype).square().mean().backward()
            if update:
                self._optimizer.step()
        return output.detach()

    def _maybe_autocast(self) -> AbstractContextManager:
        return torch.autocast(self.case.device.type, torch.bfloat16, enabled=self._autocast)

    def convolutions(self) -> dict[str, nn.Conv2d]:
        named = self.model.named_modules()
        return {name: module for name, module in named if isinstance(module, nn.Conv2d)}

    def gradients(self) -> dict[str, Tensor]:
        """Of the convolutions' weights."""
        return {name: module.weight.grad for name, module in self.convolutions().items()}
