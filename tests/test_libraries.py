"""What is said where a library is missing or broken."""

import sys

import pytest
import torch

import conv_ops
from conv_ops import _libraries


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package directory without a library."""
    directory = tmp_path / "conv_ops"
    directory.mkdir()
    monkeypatch.setattr(_libraries, "_PACKAGE", directory)
    return directory


def test_all_are_accounted_for():
    found = {library.name.split(".")[0]: library for library in conv_ops.libraries}
    assert found["libconvops"].loaded and found["_C"].loaded
    assert found["libconvops_cuda"].loaded == (conv_ops._C.cuda_build_info() is not None)
    assert all(library.loaded or library.note for library in conv_ops.libraries)
    autograd = [name for name in found if "autograd" in name]
    if not found[autograd[0]].loaded:
        assert found["conv_ops"].name == "conv_ops.autograd" and found["conv_ops"].loaded


def test_source_tree_without_libraries(package):
    (package.parent / "setup.py").touch()
    with pytest.raises(ImportError) as caught:
        _libraries._load_core()
    message = str(caught.value)
    assert f"libconvops.so is not in {package}" in message
    assert "source tree" in message and "pip install --no-build-isolation -e ." in message


def test_incomplete_installation(package):
    with pytest.raises(ImportError, match=r"libconvops\.so .* incomplete: install conv_ops again"):
        _libraries._load_core()


def test_missing_bindings(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "conv_ops._C", None)  # as if there were no such module
    with pytest.raises(ImportError, match=r"_C\..* is not in .* incomplete"):
        _libraries._load_bindings()


def test_core_of_another_torch(package):
    (package / "libconvops.so").write_bytes(b"no library")
    with pytest.raises(ImportError, match=f"torch {torch.__version__.split('+')[0]}"):
        _libraries._load_core()


def test_cuda_library_is_optional(package, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in _libraries._load_cuda().note
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built without CUDA" in _libraries._load_cuda().note
    (package / "libconvops_cuda.so").write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match=r"works without libconvops_cuda\.so"):
        library = _libraries._load_cuda()
    assert not library.loaded and "libconvops_cuda.so" in library.note


def test_unknown_autograd_is_refused(monkeypatch):
    monkeypatch.setenv("CONVOPS_AUTOGRAD", "rust")
    with pytest.raises(ValueError, match=r"CONVOPS_AUTOGRAD .* 'rust'"):
        _libraries._load_autograd()
