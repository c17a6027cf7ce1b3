"""Patches as columns and back: im2col is F.unfold, col2im is F.fold."""

import torch

import conv_ops

image, kernel = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
columns = conv_ops.im2col(image, kernel_size=3, padding=1)  # (1, 3 * 3 * 3, 64)
product = (kernel.flatten(1) @ columns).unflatten(2, (8, 8))  # a convolution is a product
torch.testing.assert_close(product, conv_ops.conv2d(image, kernel, padding=1))

counts = conv_ops.col2im(torch.ones_like(columns), (8, 8), kernel_size=3, padding=1)
print(counts[0, 0])  # in how many patches each pixel lies
