"""The file of tuned choices, so that what was timed once is known to the next process.

The first time autotune is enabled, by :mod:`conv_ops.settings` or on import by the environment
variable ``CONVOPS_AUTOTUNE=1``, the file is read, and from then on each newly tuned problem is
merged into it. It lies in ``$CONVOPS_CACHE_DIR``, else ``$XDG_CACHE_HOME/conv_ops``, else
``~/.cache/conv_ops``, one file for each version of the library; its entries are keyed by device
and problem. A file that cannot be used costs a warning and nothing else.
"""

import fcntl
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conv_ops import _C

if TYPE_CHECKING:
    from conv_ops._C import TunedChoice

_FORMAT = 1
_VERSION = _C.build_info()["version"]

_enabled = False
_enable_lock = threading.Lock()


def enable() -> None:
    """Reads the file of tuned choices and starts to keep it; does so once in a process."""
    global _enabled
    with _enable_lock:
        if _enabled:
            return
        _C.load_tuned_choices(load())
        _C.set_tuned_callback(save)
        _enabled = True


def cache_file() -> Path:
    """Where the tuned choices of this version of the library are kept."""
    directory = os.environ.get("CONVOPS_CACHE_DIR")
    if not directory:
        base = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification: a path that is not absolute is to be ignored.
        directory = os.path.join(base if os.path.isabs(base) else "~/.cache", "conv_ops")
    return Path(directory).expanduser() / f"tuned-{_VERSION}.json"


def load() -> list["TunedChoice"]:
    """The choices in the file; none, with a warning, if it is corrupt or not ours."""
    try:
        path = cache_file()
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        _warn(f"conv_ops cannot read its tuned choices: {error}")
        return []
    try:
        return _parse(text)
    except (ValueError, RecursionError) as error:
        _warn(f"conv_ops ignores the tuned choices in {path}: {error}")
        return []


def save(choice: "TunedChoice") -> None:
    """Merges one choice into the file, next to what other processes have written."""
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            choices = {(each["device"], each["problem"]): each for each in [*load(), choice]}
            document = {"format": _FORMAT, "version": _VERSION, "choices": [*choices.values()]}
            _replace(path, json.dumps(document, indent=1))
    except (OSError, RuntimeError) as error:
        _warn(f"conv_ops cannot keep its tuned choices: {error}")


def clear() -> None:
    """Forgets all tuned choices of this version, in memory and in the file."""
    _C.clear_tuned_choices()
    cache_file().unlink(missing_ok=True)


def _parse(text: bytes) -> list["TunedChoice"]:
    document = json.loads(text)
    header = {"format": _FORMAT, "version": _VERSION}
    found = {name: document.get(name) for name in header} if isinstance(document, dict) else {}
    if found != header:
        raise ValueError(f"it should have {header}, but has {found}")
    choices = document.get("choices")
    if not isinstance(choices, list) or not all(map(_is_choice, choices)):
        raise ValueError("its list of choices is malformed")
    return choices


def _is_choice(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"device", "problem", "algorithm", "milliseconds"}
        and all(isinstance(value[key], str) for key in ("device", "problem", "algorithm"))
        and isinstance(value["milliseconds"], dict)
        and all(isinstance(each, (int, float)) for each in value["milliseconds"].values())
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock against other threads and processes, so that none loses another's choice."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield


def _replace(path: Path, text: str) -> None:
    """Writes the file as one step: a reader sees the old or the new one, never a part."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
