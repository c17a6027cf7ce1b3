"""A convolution and its gradients, used like torch.nn.functional.conv2d and torch.nn.Conv2d."""

import torch

import conv_ops

images = torch.randn(8, 3, 64, 64, requires_grad=True)
weight = torch.randn(16, 3, 3, 3)
features = conv_ops.conv2d(images, weight, stride=2, padding=1)

layer = conv_ops.Conv2d(16, 32, kernel_size=3, padding="same")
layer(features).square().mean().backward()
print(features.shape, images.grad.shape, layer.weight.grad.shape)
