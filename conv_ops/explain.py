"""Shows which algorithm a convolution gets, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from conv_ops import _C
from conv_ops.functional import _pair, explicit_padding
from conv_ops.settings import check_precision

_DIRECTIONS = ("forward", "backward_input", "backward_weight")


@dataclass(frozen=True)
class Candidate:
    """One algorithm's prospects on a problem.

    Attributes:
        algorithm: Its name.
        reason: Why it cannot run the problem; empty if it can.
        predicted_ms: Estimated time in milliseconds.
        measured_ms: Measured time, once the problem has been tuned.
        workspace: Bytes of scratch memory it takes.
        chosen: Whether it is what a call gets under the present settings.
    """

    algorithm: str
    reason: str
    predicted_ms: float | None
    measured_ms: float | None
    workspace: int | None
    chosen: bool

    @property
    def can_run(self) -> bool:
        """Whether it can run the problem."""
        return not self.reason


@dataclass(frozen=True)
class Explanation:
    """All algorithms' prospects on a problem; its text is a table.

    Attributes:
        problem: One line that describes the problem.
        device: Name of the device.
        candidates: The algorithms of that device in their order of preference.
    """

    problem: str
    device: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate | None:
        """The algorithm a call gets, or None if none can run the problem."""
        return next((each for each in self.candidates if each.chosen), None)

    def __str__(self) -> str:
        rows = [("  algorithm", "predicted", "measured", "workspace", "")]
        rows += [
            (
                ("> " if each.chosen else "  ") + each.algorithm,
                _milliseconds(each.predicted_ms),
                _milliseconds(each.measured_ms),
                _bytes(each.workspace),
                "" if each.can_run else f"cannot run: {each.reason}",
            )
            for each in self.candidates
        ]
        name, *numbers = (max(map(len, column)) for column in list(zip(*rows, strict=True))[:4])
        lines = [f"{self.problem} on {self.device}"]
        for row in rows:
            cells = [row[0].ljust(name)]
            cells += [cell.rjust(width) for cell, width in zip(row[1:4], numbers, strict=True)]
            lines.append("  ".join([*cells, row[4]]).rstrip())
        return "\n".join(lines)


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    direction: str = "forward",
    precision: str | None = None,
) -> Explanation:
    """Prints which algorithms can run a convolution, at what cost, and which is chosen.

    Nothing is computed; a convolution of the same arguments in the same thread gets the algorithm
    that is marked.

    Args:
        input: As in :func:`conv_ops.conv2d`, for the backward directions too. Only shape,
            strides, dtype and device of the tensors matter.
        weight: See ``input``.
        bias: See ``input``.
        stride: As in :func:`conv_ops.conv2d`.
        padding: As in :func:`conv_ops.conv2d`.
        dilation: As in :func:`conv_ops.conv2d`.
        groups: As in :func:`conv_ops.conv2d`.
        direction: ``"forward"``, ``"backward_input"`` or ``"backward_weight"``.
        precision: As in :func:`conv_ops.conv2d`.

    Returns:
        What was printed.

    Raises:
        ValueError: If direction or precision is unknown, or no kernel takes the dtype or device.
        RuntimeError: If the arguments do not make a convolution, as in :func:`conv_ops.conv2d`.
    """
    explanation = examine(
        input, weight, bias, stride, padding, dilation, groups, direction, precision
    )
    print(explanation)
    return explanation


def examine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    direction: str = "forward",
    precision: str | None = None,
) -> Explanation:
    """Returns what :func:`explain` prints."""
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction must be one of {_DIRECTIONS}, but got {direction!r}")
    found = _C.explain(
        direction,
        _info(input.unsqueeze(0) if input.dim() == 3 else input),
        _info(weight),
        None,
        bias is not None and direction == "forward",
        _pair(stride),
        explicit_padding(padding, weight, stride, dilation),
        _pair(dilation),
        groups,
        check_precision(precision),
    )
    candidates = tuple(Candidate(**each) for each in found["candidates"])
    return Explanation(found["problem"], found["device"], candidates)


def _info(tensor: Tensor) -> "_C.TensorInfo":
    dtype = str(tensor.dtype).removeprefix("torch.")
    device = tensor.device
    return (list(tensor.shape), list(tensor.stride()), dtype, device.type, device.index or 0)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ms"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"
