"""A model of plain torch.nn modules that from then on computes its convolutions here."""

import torch
from torch import nn

import conv_ops

model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2))
images = torch.randn(4, 3, 32, 32)
expected = model(images)

conv_ops.convert_conv2d(model)  # the same modules and parameters; revert_conv2d undoes it
torch.testing.assert_close(model(images), expected)
print(model)
