"""Rules of ``torch.vmap``: a batch of calls becomes one call of the same op.

A convolution sums over indices that its three tensors share::

    input  (N, G, C, H, W)
    weight    (G, O, C, KH, KW)
    output (N, G, O, OH, OW)

G is the group; C and O are the channels within a group. G is in all three tensors, each of N, C
and O in two. Where two tensors are batched (one of them the result), the batch joins the index of
those two: a batched input and an unbatched weight make a larger N. Where all three are, the batch
joins G: more groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_INDICES = {"input": "NGC", "weight": "GOC", "output": "NGO", "bias": "GO"}


def register() -> None:
    """Registers the rules of all core ops of the package."""
    for name, rule in {
        "conv2d_forward": _conv2d_forward,
        "conv2d_backward_input": _conv2d_backward_input,
        "conv2d_backward_weight": _conv2d_backward_weight,
        "im2col": _im2col,
        "col2im": _col2im,
    }.items():
        torch.library.register_vmap(f"convops::{name}", rule)


class _Batch:
    """The batch of one call: which index it joins, and the number of groups after that.

    Args:
        size: Size of the batch.
        groups: Number of groups of one convolution of the batch.
        result: What the op computes: "input", "weight" or "output".
        dims: By operand the dimension of its batch, or None.
    """

    def __init__(self, size: int, groups: int, result: str, **dims: int | None):
        batched = [result, *(role for role, dim in dims.items() if dim is not None)]
        shared = set.intersection(*(set(_INDICES[role]) for role in batched))
        self.size = size
        self.index = next(iter(shared - {"G"}), "G")
        self.groups_of_one = groups
        self.groups = groups * size if self.index == "G" else groups

    def fold(self, tensor: Tensor, dim: int | None, role: str) -> Tensor:
        """The operand of the one call."""
        if dim is None:
            return tensor
        group, place = self._axes(role)
        tensor = tensor.movedim(dim, 0)
        per_group = tensor.shape[group + 1] // self.groups_of_one
        split = tensor.unflatten(group + 1, (self.groups_of_one, per_group))
        return split.movedim(0, place).flatten(place, place + 1).flatten(group, group + 1)

    def unfold(self, tensor: Tensor, role: str) -> Tensor:
        """The results of the batch, along dimension 0, from the result of the one call."""
        group, place = self._axes(role)
        split = tensor.unflatten(group, (self.groups, tensor.shape[group] // self.groups))
        split = split.unflatten(place, (self.size, split.shape[place] // self.size))
        return split.movedim(place, 0).flatten(group + 1, group + 2)

    def fold_size(self, size: Sequence[int], role: str) -> list[int]:
        """The size of the one call's result, from that of one convolution of the batch."""
        group, place = self._axes(role)
        axis = place if place <= group else place - 1
        return [n * self.size if i == axis else n for i, n in enumerate(size)]

    def _axes(self, role: str) -> tuple[int, int]:
        return _INDICES[role].index("G"), _INDICES[role].index(self.index)


def _conv2d_forward(info, in_dims, input, weight, bias, stride, padding, dilation, groups, *choice):
    input_dim, weight_dim, bias_dim = in_dims[:3]
    batch = _Batch(info.batch_size, groups, "output", input=input_dim, weight=weight_dim)
    added = None
    if weight_dim is not None and bias is not None:  # the bias goes along with its weight
        if bias_dim is None:
            bias, bias_dim = bias.expand(info.batch_size, -1), 0
        bias = batch.fold(bias, bias_dim, "bias")
    elif bias_dim is not None:  # one weight, many biases
        added, bias = bias.movedim(bias_dim, 0)[:, None, :, None, None], None
    output = torch.ops.convops.conv2d_forward(
        batch.fold(input, input_dim, "input"),
        batch.fold(weight, weight_dim, "weight"),
        bias,
        stride,
        padding,
        dilation,
        batch.groups,
        *choice,
    )
    if input_dim is not None or weight_dim is not None:
        output = batch.unfold(output, "output")
    return (output, 0) if added is None else (output + added, 0)


def _conv2d_backward_input(
    info, in_dims, grad_output, weight, input_size, stride, padding, dilation, groups, *choice
):
    output_dim, weight_dim = in_dims[:2]
    batch = _Batch(info.batch_size, groups, "input", output=output_dim, weight=weight_dim)
    grad_input = torch.ops.convops.conv2d_backward_input(
        batch.fold(grad_output, output_dim, "output"),
        batch.fold(weight, weight_dim, "weight"),
        batch.fold_size(input_size, "input"),
        stride,
        padding,
        dilation,
        batch.groups,
        *choice,
    )
    return batch.unfold(grad_input, "input"), 0


def _conv2d_backward_weight(
    info,
    in_dims,
    grad_output,
    input,
    weight_size,
    weight_stride,
    stride,
    padding,
    dilation,
    groups,
    *choice,
):
    output_dim, input_dim = in_dims[:2]
    batch = _Batch(info.batch_size, groups, "weight", output=output_dim, input=input_dim)
    grad_weight = torch.ops.convops.conv2d_backward_weight(
        batch.fold(grad_output, output_dim, "output"),
        batch.fold(input, input_dim, "input"),
        batch.fold_size(weight_size, "weight"),
        [],  # the strides of one weight say nothing of a batch of them
        stride,
        padding,
        dilation,
        batch.groups,
        *choice,
    )
    return batch.unfold(grad_weight, "weight"), 0


def _im2col(info, in_dims, input, *window):
    return _as_images(torch.ops.convops.im2col, input.movedim(in_dims[0], 0), 4, *window)


def _col2im(info, in_dims, input, *window):
    return _as_images(torch.ops.convops.col2im, input.movedim(in_dims[0], 0), 3, *window)


def _as_images(op, input: Tensor, batched_dims: int, *window):
    """Calls an op that takes `batched_dims` dimensions, with the batch as its batch of images."""
    if input.dim() == batched_dims:
        return op(input, *window), 0
    return op(input.flatten(0, 1), *window).unflatten(0, input.shape[:2]), 0
