"""What conv_ops does, in under a minute on two cores; writes build/demo.png.

First one large convolution, forward and backward, against PyTorch: its time, its error and the
algorithm that was chosen. Then a photograph, blurred, its edges, and denoised by a small network
that is converted to conv_ops and trained there.

Usage: python examples/demo.py [--device cpu|cuda] [--output PNG]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import cbook
from torch import Tensor, nn

import conv_ops

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = ("output", "input.grad", "weight.grad", "bias.grad")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"))
    arguments = parser.parse_args()
    torch.manual_seed(0)

    right = large_convolution(arguments.device)
    panels, alike = photograph(arguments.device)
    draw(panels, arguments.output)
    print(f"\nBefore and after: {arguments.output.resolve()}")
    return 0 if right and alike else 1


# ---- One large convolution ---------------------------------------------------------------------


def large_convolution(device: str) -> bool:
    """Runs it forward and backward here and in PyTorch; returns whether the results are right."""
    shape = scaled_to_machine(device)
    print(f"Conv2d(64, 128, kernel_size=3) on {'x'.join(map(str, shape))}, {device}, float32\n")
    images = torch.randn(shape, device=device)
    ours = conv_ops.Conv2d(64, 128, kernel_size=3).to(device)
    theirs = conv_ops.revert_conv2d(copy.deepcopy(ours))

    for direction in ("forward", "backward_input", "backward_weight"):
        conv_ops.explain(images, ours.weight, ours.bias, direction=direction)
        print()

    exact = results(copy.deepcopy(theirs).double(), images.double())
    errors = {}
    print(f"{'':10}{'forward':>12}{'backward':>12}   largest error / largest value")
    for name, layer in (("conv_ops", ours), ("PyTorch", theirs)):
        forward, backward = times(layer, images)
        errors[name] = [
            ((result - reference).abs().max() / reference.abs().max()).item()
            for result, reference in zip(results(layer, images), exact, strict=True)
        ]
        listed = "  ".join(f"{r} {e:.1e}" for r, e in zip(RESULTS, errors[name], strict=True))
        print(f"{name:10}{forward:9.1f} ms{backward:9.1f} ms   {listed}")

    pairs = zip(errors["conv_ops"], errors["PyTorch"], strict=True)
    right = all(ours <= 2 * theirs + 1e-6 for ours, theirs in pairs)
    print("Errors against float64 are", "those of PyTorch." if right else "TOO LARGE.")
    return right


def scaled_to_machine(device: str) -> tuple[int, int, int, int]:
    """Returns 8x64x512x1024 (KernelBench level 1, problem 55), smaller where that takes long."""
    n, c, h, w = 8, 64, 512, 1024
    if device == "cuda":
        while n > 1 and 100 * n * c * h * w > torch.cuda.mem_get_info()[0]:  # float64 needs most
            n //= 2
        return n, c, h, w
    budget = 10e9 * torch.get_num_threads()  # floating-point operations, a fraction of a second
    while 2 * 128 * 9 * n * c * h * w > budget and h > 64:
        n, h, w = (n // 2, h, w) if n > 1 else (n, h // 2, w) if w < 2 * h else (n, h, w // 2)
    return n, c, h, w


def results(layer: nn.Conv2d, images: Tensor) -> list[Tensor]:
    """Returns the RESULTS of a layer for one and the same gradient of the output."""
    images = images.detach().requires_grad_()
    output = layer(images)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.rand(output.shape, generator=generator).to(output)
    inputs = [images, layer.weight, layer.bias]
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def times(layer: nn.Conv2d, images: Tensor) -> tuple[float, float]:
    """Returns milliseconds of forward and of backward."""
    images = images.detach().requires_grad_()
    output = layer(images)
    gradient = torch.ones_like(output)
    with torch.no_grad():
        forward = milliseconds(lambda: layer(images))
    inputs = [images, layer.weight, layer.bias]
    backward = milliseconds(lambda: torch.autograd.grad(output, inputs, gradient, True))
    return forward, backward


def milliseconds(run: Callable[[], object]) -> float:
    """Returns the median time of three runs, after one that does not count."""
    measured = []
    for _ in range(4):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        measured.append(1e3 * (time.perf_counter() - start))
    return statistics.median(measured[1:])


# ---- A photograph ------------------------------------------------------------------------------


def photograph(device: str) -> tuple[list[tuple[str, Tensor]], bool]:
    """Filters a photograph; returns titled pictures, and whether PyTorch filters it alike."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = np.array(plt.imread(file))
    photo = torch.from_numpy(pixels).to(device).movedim(-1, 0)[None].float() / 255
    noisy = with_noise(photo)
    denoiser = trained_denoiser(photo)
    with torch.no_grad():
        blurred, outlines, clean = blur(photo), edges(photo), denoiser(noisy).clamp(0, 1)
        theirs = conv_ops.revert_conv2d(copy.deepcopy(denoiser))(noisy).clamp(0, 1)
    difference = (clean - theirs).abs().max().item()
    print(f"Denoised photograph, conv_ops against PyTorch: largest difference {difference:.1e}")
    face = (..., slice(95, 335), slice(140, 345))  # where noise can be seen
    panels = [
        ("a photograph", photo),
        ("blur: Gaussian 25x25, depthwise", blurred),
        ("edges: Sobel, two outputs", outlines),
        (f"with noise: {psnr(noisy, photo):.1f} dB", noisy[face]),
        (f"denoised by a converted network: {psnr(clean, photo):.1f} dB", clean[face]),
        ("without noise", photo[face]),
    ]
    return panels, difference < 1e-2


def blur(photo: Tensor, size: int = 25, sigma: float = 5.0) -> Tensor:
    """Returns the photograph under a Gaussian, each colour by itself."""
    line = torch.exp(-((torch.arange(size, device=photo.device) - size // 2) ** 2) / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(photo, [size // 2] * 4, mode="reflect")
    return conv_ops.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)


def edges(photo: Tensor) -> Tensor:
    """Returns the length of the brightness's gradient."""
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=photo.device)
    kernel = torch.stack([across, across.T])[:, None]
    gradient = conv_ops.conv2d(photo.mean(1, keepdim=True), kernel, padding="same")
    return gradient.square().sum(1, keepdim=True).sqrt().clamp(max=1)


class Denoiser(nn.Module):
    """A network of plain torch.nn layers that estimates the noise and takes it away."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
            nn.Conv2d(16, 3, 3, padding=1),
        )

    def forward(self, image: Tensor) -> Tensor:
        return image - self.noise(image)


def trained_denoiser(photo: Tensor, steps: int = 200) -> nn.Module:
    """Returns a Denoiser that was converted to conv_ops, then trained on pieces of a photograph."""
    network = conv_ops.convert_conv2d(Denoiser().to(photo.device))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(steps):
        corners = zip(*(torch.randint(s - 64, (8,)).tolist() for s in photo.shape[2:]), strict=True)
        target = torch.stack([photo[0, :, y : y + 64, x : x + 64] for y, x in corners])
        loss = F.mse_loss(network(with_noise(target)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"\nTrained a denoiser for {steps} steps in {time.perf_counter() - start:.1f} s")
    return network


def with_noise(image: Tensor) -> Tensor:
    """Returns the image with Gaussian noise."""
    return (image + 0.15 * torch.randn_like(image)).clamp(0, 1)


def psnr(image: Tensor, original: Tensor) -> float:
    """Returns the ratio of peak signal to noise in decibels."""
    return -10 * torch.log10(F.mse_loss(image, original)).item()


def draw(panels: list[tuple[str, Tensor]], path: Path) -> None:
    """Writes the pictures, three in a row."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 10), layout="constrained")
    for axis, (title, picture) in zip(axes.flat, panels, strict=True):
        axis.imshow(picture[0].movedim(0, -1).clamp(0, 1).cpu(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    figure.suptitle("Computed by conv_ops", fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
