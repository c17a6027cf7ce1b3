"""What the package computes with: precision, algorithm, workspace limit, autotune.

Each has one value for the process, set by a setter, and may have another for the calling thread
inside a context manager::

    conv_ops.settings.set_workspace_limit(2**28)
    with conv_ops.settings.precision("ieee"), conv_ops.settings.algorithm("direct"):
        loss = model(images).sum()
    loss.backward()  # with the settings of the forward

The thread's value wins over the process's, and the ``precision`` and ``algorithm`` of a call or
module win over both. For the context managers None means "no value of the thread's own": inside
``precision(None)`` the process's value holds again. For ``set_precision`` and ``set_algorithm``
None means the default: to follow PyTorch, and to let the plan choose.

A program made by ``torch.compile`` or ``torch.export`` keeps the thread's precision and algorithm
of the time of its compilation; enter a context manager outside compiled code.
"""

import operator
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from conv_ops import _C, tuning

_process_lock = threading.Lock()


@dataclass(frozen=True)
class Settings:
    """The settings in force.

    Attributes:
        precision: Arithmetic of float32 on CUDA: ``"ieee"``, ``"tf32"``, or None for what
            ``torch.backends.cudnn.conv.fp32_precision`` says.
        algorithm: Name of the one algorithm to use, or None if the plan chooses.
        workspace_limit: Most bytes of scratch memory that a convolution may take.
        autotune: Whether a new problem's algorithms are timed, and the fastest kept.
    """

    precision: str | None
    algorithm: str | None
    workspace_limit: int
    autotune: bool


def get() -> Settings:
    """The settings in force in the calling thread."""
    return Settings(**_C.effective_settings())


def set_precision(value: str | None) -> None:
    """Sets the arithmetic of float32 on CUDA for the process.

    Args:
        value: ``"ieee"``, ``"tf32"`` (one product of operands rounded to TF32), or None to follow
            PyTorch's setting for convolutions, the default.

    Raises:
        ValueError: For any other value.
    """
    _set("precision", check_precision(value))


def set_algorithm(value: str | None) -> None:
    """Sets the one algorithm for the process; a call that it cannot run is an error.

    Args:
        value: A name that ``python -m conv_ops`` lists, or None to let the plan choose, the
            default.

    Raises:
        ValueError: If there is no such algorithm.
    """
    _set("algorithm", check_algorithm(value))


def set_workspace_limit(value: int) -> None:
    """Sets the most bytes of scratch memory of a convolution for the process (default 1 GiB).

    Raises:
        ValueError: If the value is negative.
        TypeError: If it is not an integer.
    """
    _set("workspace_limit", _check_workspace_limit(value))


def set_autotune(value: bool) -> None:
    """Sets for the process whether new problems are tuned (default False); see ``tuning``.

    Raises:
        TypeError: If the value is not a bool.
    """
    _set("autotune", _check_autotune(value))


@contextmanager
def precision(value: str | None) -> Iterator[None]:
    """Like :func:`set_precision`, for the calling thread and the ``with`` block."""
    with _override("precision", check_precision(value)):
        yield


@contextmanager
def algorithm(value: str | None) -> Iterator[None]:
    """Like :func:`set_algorithm`, for the calling thread and the ``with`` block."""
    with _override("algorithm", check_algorithm(value)):
        yield


@contextmanager
def workspace_limit(value: int | None) -> Iterator[None]:
    """Like :func:`set_workspace_limit`, for the calling thread and the ``with`` block."""
    with _override("workspace_limit", None if value is None else _check_workspace_limit(value)):
        yield


@contextmanager
def autotune(value: bool | None) -> Iterator[None]:
    """Like :func:`set_autotune`, for the calling thread and the ``with`` block."""
    with _override("autotune", None if value is None else _check_autotune(value)):
        yield


def torch_precision() -> str:
    """What PyTorch's setting for float32 convolutions on CUDA says: "ieee" or "tf32"."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def check_precision(value: str | None) -> str | None:
    """Returns the value if it is a precision or None, else raises ValueError."""
    if value not in (None, "ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee', 'tf32' or None, but got {value!r}")
    return value


def check_algorithm(value: str | None) -> str | None:
    """Returns the value if it is the name of an algorithm or None, else raises ValueError."""
    names = list(dict.fromkeys(each["name"] for each in _C.algorithms()))
    if value is not None and value not in names:
        raise ValueError(f"algorithm must be one of {names} or None, but got {value!r}")
    return value


def _check_workspace_limit(value: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"workspace_limit must be a number of bytes, but got {value!r}")
    try:
        limit = operator.index(value)
    except TypeError:
        raise TypeError(f"workspace_limit must be a number of bytes, but got {value!r}") from None
    if not 0 <= limit < 2**63:
        raise ValueError(f"workspace_limit must be between 0 and 2**63 - 1, but got {value!r}")
    return limit


def _check_autotune(value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"autotune must be True or False, but got {value!r}")
    if value:
        tuning.enable()
    return value


def _set(name: str, value: Any) -> None:
    with _process_lock:  # two setters must not write each other's field back
        _C.set_settings("process", {**_C.get_settings("process"), name: value})


@contextmanager
def _override(name: str, value: Any) -> Iterator[None]:
    saved = _C.get_settings("thread")
    _C.set_settings("thread", {**saved, name: value})
    try:
        yield
    finally:
        _C.set_settings("thread", {**_C.get_settings("thread"), name: saved[name]})
