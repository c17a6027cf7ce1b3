"""A scripted program with the op in it, saved, loaded and run again."""

import tempfile

import torch
from torch import Tensor

import conv_ops


@torch.jit.script
def edges(image: Tensor, kernel: Tensor) -> Tensor:
    return conv_ops.conv2d(image, kernel, padding="same").abs()


image, kernel = torch.rand(1, 1, 32, 32), torch.tensor([[[[1.0, 0.0, -1.0]]]])
with tempfile.NamedTemporaryFile(suffix=".pt") as file:
    edges.save(file.name)
    loaded = torch.jit.load(file.name)
assert torch.equal(loaded(image, kernel), edges(image, kernel))
print(loaded.graph)
