"""Finds and loads the libraries of the package, and remembers what was loaded and why not.

Importing it loads them; after that the ops and ``_C`` are there.
"""

import os
import warnings
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Library:
    """One library of the package.

    Attributes:
        name: The file's name, or for ``autograd`` in Python the module's.
        loaded: Whether it is in use in this process.
        note: Why it is not loaded, or a remark on what was; may be empty.
    """

    name: str
    loaded: bool
    note: str = ""


def _load_core() -> Library:
    name = "libconvops.so"
    if not (_PACKAGE / name).exists():
        raise ImportError(_missing(name))
    try:
        torch.ops.load_library(_PACKAGE / name)
    except OSError as error:
        raise ImportError(
            f"conv_ops cannot load {name} with torch {torch.__version__}: {error}"
        ) from error
    return Library(name, loaded=True)


def _load_cuda() -> Library:
    name = "libconvops_cuda.so"
    if torch.version.cuda is None:
        return Library(name, loaded=False, note=f"torch {torch.__version__} has no CUDA")
    if not (_PACKAGE / name).exists():
        return Library(name, loaded=False, note="conv_ops was built without CUDA")
    return _try_to_load(name)


def _load_autograd() -> tuple[Library, ...]:
    """Loads the C++ autograd library made for this torch, or registers the same in Python."""
    major, minor = torch.__version__.split(".")[:2]
    name = f"libconvops_autograd_t{major}{minor}.so"
    wish = os.environ.get("CONVOPS_AUTOGRAD", "")
    if wish not in ("", "python"):
        raise ValueError(f"CONVOPS_AUTOGRAD must be 'python' or unset, but is {wish!r}")
    if wish:
        library = Library(name, loaded=False, note=f"CONVOPS_AUTOGRAD={wish}")
    elif not (_PACKAGE / name).exists():
        library = Library(name, loaded=False, note=f"not built for torch {major}.{minor}")
    else:
        library = _try_to_load(name)
    if library.loaded:
        return (library,)

    from conv_ops import autograd

    autograd.register()
    return (library, Library(autograd.__name__, loaded=True, note="costs more time on the host"))


def _register_rules() -> None:
    """Registers the fake kernels and vmap rules, which are in Python for every torch."""
    from conv_ops import meta, vmap

    meta.register()
    vmap.register()


def _load_bindings() -> Library:
    name = f"_C{EXTENSION_SUFFIXES[0]}"
    try:
        import_module("conv_ops._C")
    except ModuleNotFoundError as error:
        raise ImportError(_missing(name)) from error
    return Library(name, loaded=True)


def _try_to_load(name: str) -> Library:
    """Loads a library that the package can do without; a failure warns and is remembered."""
    try:
        torch.ops.load_library(_PACKAGE / name)
    except OSError as error:
        warnings.warn(
            f"conv_ops works without {name}, which torch {torch.__version__} cannot load: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return Library(name, loaded=False, note=str(error))
    return Library(name, loaded=True)


def _missing(name: str) -> str:
    message = f"conv_ops: {name} is not in {_PACKAGE}."
    if (_PACKAGE.parent / "setup.py").exists():
        return (
            f"{message} This is the source tree, which has no libraries until they are built: "
            "`pip install --no-build-isolation -e .` builds them here; after "
            "`pip install --no-build-isolation .` start Python in another directory, so that "
            "the source tree does not shadow the installed package."
        )
    return (
        f"{message} The installation is incomplete: install conv_ops again, with "
        "`pip install --no-build-isolation .` in its source tree."
    )


def _load() -> tuple[Library, ...]:
    """Loads all in the order of their dependence."""
    core, cuda, autograd = _load_core(), _load_cuda(), _load_autograd()
    _register_rules()
    bindings = _load_bindings()
    if not autograd[0].loaded:
        from conv_ops import _C, settings

        _C.set_torch_precision_reader(settings.torch_precision)  # as the C++ library does
    return (core, cuda, *autograd, bindings)


libraries = _load()
