"""Saves a TorchScript program that uses conv_ops, and what it computes, for main.cpp to compare.

Prints the command line that runs the built example.
"""

import sys
from pathlib import Path

import torch

import conv_ops


class Reference(torch.nn.Module):
    """Tensors by name, in the form that C++ can load."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach())

    def forward(self) -> int:
        return 0


def save(directory: Path) -> list[str]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        conv_ops.Conv2d(3, 8, 5, stride=2, padding=2),
        torch.nn.ReLU(),
        conv_ops.Conv2d(8, 8, 3, padding="same", groups=4, bias=False),
        torch.nn.ReLU(),
        conv_ops.Conv2d(8, 4, 1),
    )
    program = torch.jit.script(model)
    program.save(directory / "program.pt")

    input = torch.randn(2, 3, 20, 24, requires_grad=True)
    output = program(input)
    output.square().sum().backward()
    tensors = {"input": input, "output": output, "input_gradient": input.grad}
    for name, parameter in model.named_parameters():
        tensors[name.replace(".", "_") + "_gradient"] = parameter.grad
    torch.jit.script(Reference(tensors)).save(directory / "reference.pt")

    package = Path(conv_ops.__file__).parent
    version = "".join(torch.__version__.split(".")[:2])
    libraries = [package / "libconvops.so", package / f"libconvops_autograd_t{version}.so"]
    return [str(p) for p in (directory / "program.pt", directory / "reference.pt", *libraries)]


if __name__ == "__main__":
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    print("convops_example", *save(directory))
