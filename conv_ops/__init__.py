"""conv_ops: two-dimensional convolution for PyTorch with CPU and CUDA kernels of its own.

``conv2d``, ``im2col`` and ``col2im`` are functions, ``Conv2d`` and ``LazyConv2d`` modules, all
drop-in for those of ``torch.nn``; ``convert_conv2d`` lets a whole model use them. ``settings``
holds what they compute with, ``explain`` shows which algorithm they choose.
``python -m conv_ops`` tells about an installation and checks it.
"""

import os

from conv_ops._libraries import Library, libraries  # first: it loads what the others need

# isort: split
from conv_ops import settings, tuning
from conv_ops.convert import (
    ConversionReport,
    conversion_report,
    convert_conv2d,
    revert_conv2d,
)
from conv_ops.explain import Candidate, Explanation, explain
from conv_ops.functional import col2im, conv2d, im2col
from conv_ops.modules import Conv2d, LazyConv2d

__version__ = "0.1.0"

__all__ = [
    "Candidate",
    "Conv2d",
    "ConversionReport",
    "Explanation",
    "LazyConv2d",
    "Library",
    "col2im",
    "conv2d",
    "conversion_report",
    "convert_conv2d",
    "explain",
    "im2col",
    "libraries",
    "revert_conv2d",
    "settings",
    "tuning",
]

if os.environ.get("CONVOPS_AUTOTUNE") == "1":
    settings.set_autotune(True)
