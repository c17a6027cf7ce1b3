"""Changes the convolutions of a model to this package's and back."""

import logging
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from conv_ops.modules import Conv2d

_logger = logging.getLogger("conv_ops")

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ConversionReport:
    """Which convolutions of a model this package computes, and which not and why.

    Attributes:
        converted: Names of the modules that are :class:`conv_ops.Conv2d`.
        convertible: Names of the modules that :func:`convert_conv2d` would convert.
        skipped: For the names of the other two-dimensional convolutions the reason why not.
    """

    converted: tuple[str, ...]
    convertible: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"converted: {len(self.converted)}", f"convertible: {len(self.convertible)}"]
        lines.append(f"skipped: {len(self.skipped)}")
        lines += [f"  {name or '(root)'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def convert_conv2d(module: nn.Module) -> nn.Module:
    """Lets this package compute every :class:`torch.nn.Conv2d` in a module.

    Each convolution changes its class and nothing else: it stays the same object with the same
    parameters, hooks, mode and attributes, wherever it is referred to. (So, other than
    ``SyncBatchNorm.convert_sync_batchnorm``, this changes a bare ``nn.Conv2d`` too; copy the
    module first to keep the original.) What is more than a plain ``nn.Conv2d`` is left alone, and
    a warning of the logger ``conv_ops`` says why; :func:`conversion_report` tells the same at any
    time. Calls of ``torch.nn.functional.conv2d`` in a model's code are not changed.

    Args:
        module: A model or one convolution. Convert before ``torch.compile``.

    Returns:
        The same module.
    """
    report = conversion_report(module)
    for name in report.convertible:
        module.get_submodule(name).__class__ = Conv2d
    for name, reason in report.skipped.items():
        _logger.warning("convert_conv2d skips %s: %s", name or "the module", reason)
    return module


def revert_conv2d(module: nn.Module) -> nn.Module:
    """Undoes :func:`convert_conv2d`: every :class:`conv_ops.Conv2d` becomes a ``nn.Conv2d``.

    Each stays the same object; a precision or algorithm of its own is dropped. Subclasses, among
    them lazy and parametrized modules, are left alone.

    Args:
        module: A model or one convolution.

    Returns:
        The same module.
    """
    for child in module.modules():
        if type(child) is Conv2d:
            child.__class__ = nn.Conv2d
            for name in ("precision", "algorithm"):
                vars(child).pop(name, None)
    return module


def conversion_report(module: nn.Module) -> ConversionReport:
    """Tells which convolutions of a module this package computes, or why it does not.

    Args:
        module: A model or one convolution, before or after :func:`convert_conv2d`.
    """
    converted, convertible, skipped = [], [], {}
    for name, child in module.named_modules():
        if isinstance(child, Conv2d):
            converted.append(name)
        elif _is_conv2d(child):
            obstacle = _obstacle(child)
            if obstacle is None:
                convertible.append(name)
            else:
                skipped[name] = obstacle
    return ConversionReport(tuple(converted), tuple(convertible), skipped)


def _is_conv2d(module: nn.Module) -> bool:
    """Whether it is a Conv2d of torch.nn, of torch.ao's quantized modules or of TorchScript."""
    names = [base.__name__ for base in type(module).__mro__]
    return "Conv2d" in names or getattr(module, "original_name", None) == "Conv2d"


def _obstacle(module: nn.Module) -> str | None:
    """Why a convolution cannot be converted; None if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript; convert before scripting"
    if parametrize.is_parametrized(module):
        return f"it is parametrized ({', '.join(module.parametrizations)})"
    if isinstance(module, nn.LazyConv2d):
        return "it is lazy; run it once before converting"
    if type(module) is not nn.Conv2d:
        return f"it is a {torch.typename(module)}, not exactly a torch.nn.Conv2d"
    if "_conv_forward" in vars(module):
        return "its _conv_forward has been replaced"
    weight = module._parameters.get("weight")
    if weight is None:
        return "a hook computes its weight (spectral_norm, weight_norm or pruning)"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__qualname__}"
    if weight.dtype not in _DTYPES:
        return f"its weight is of {weight.dtype}"
    if weight.device.type not in ("cpu", "cuda", "meta"):
        return f"its weight is on {weight.device}"
    return None
