"""What is installed, what a wheel may hold, and what the build says where it cannot go on."""

import importlib.metadata
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import conv_ops
from conv_ops import _C

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(conv_ops.__file__).parent


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_installed_files():
    minor = "".join(torch.__version__.split(".")[:2])
    for name in ("libconvops.so", f"libconvops_autograd_t{minor}.so", "py.typed", "_C.pyi"):
        assert (PACKAGE / name).is_file(), name
    assert Path(_C.__file__).parent == PACKAGE


def test_one_version_everywhere():
    assert _C.build_info()["version"] == conv_ops.__version__
    assert f"\n## {conv_ops.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="conv_ops")), reason="used from its source tree"
)
def test_version_of_the_distribution_tells_what_it_was_built_with():
    version = importlib.metadata.version("conv_ops")
    assert re.fullmatch(re.escape(conv_ops.__version__) + r"\+(cpu|cu\d+)", version), version


@pytest.mark.parametrize("name", ["libconvops.so", "libconvops_cuda.so"])
def test_libraries_run_without_python(name):
    library = PACKAGE / name
    if not library.is_file():
        pytest.skip("built without it")
    assert b"libtorch_python" not in library.read_bytes()
    assert b"libcudnn" not in library.read_bytes()


def test_demanding_cuda_without_a_compiler_fails_and_says_what_is_missing():
    result = setup("--version", CONVOPS_CUDA="1", CUDA_HOME="/nowhere")
    assert result.returncode != 0
    missing = "CUDA_HOME='/nowhere'" if torch.version.cuda else "a build without CUDA"
    assert "CONVOPS_CUDA=1, but" in result.stderr and missing in result.stderr


def test_cuda_is_left_out_where_there_is_no_compiler():
    result = setup("--version", CONVOPS_CUDA="auto", CUDA_HOME="/nowhere")
    assert result.stdout.splitlines()[-1] == f"{conv_ops.__version__}+cpu"
    assert "building for the CPU only" in result.stdout


def test_unknown_value_of_the_switch_is_refused():
    result = setup("--version", CONVOPS_CUDA="yes")
    assert result.returncode != 0
    assert "CONVOPS_CUDA must be 0, 1 or auto, got 'yes'" in result.stderr


def test_build_without_torch_says_what_to_do(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    result = setup("--version", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "Install torch" in result.stderr and "--no-build-isolation" in result.stderr


def test_files_of_a_wheel_are_checked():
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / "scripts/check_wheel.py")
    check_wheel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_wheel)

    names = ["__init__.py", "modules.py", "py.typed", "_C.pyi", "_C.cpython-311-x86_64.so"]
    names += ["libconvops.so", "libconvops_autograd_t211.so", "libconvops_autograd_t213.so"]
    names = [f"conv_ops/{name}" for name in names] + ["conv_ops-0.1.0+cpu.dist-info/METADATA"]
    assert check_wheel.problems("conv_ops-0.1.0+cpu.whl", names) == []
    cuda = "conv_ops/libconvops_cuda.so"
    assert check_wheel.problems("conv_ops-0.1.0+cu130.whl", [*names, cuda]) == []
    assert check_wheel.problems("conv_ops-0.1.0+cu130.whl", names)
    for stray in (cuda, "tests/test_conv2d.py", "conv_ops/csrc/problem.h", "conv_ops/a.o"):
        assert check_wheel.problems("conv_ops-0.1.0+cpu.whl", [*names, stray])
    for name in names:
        rest = [other for other in names if other != name]
        needed = not re.search(r"modules|pyi|autograd|METADATA", name)
        assert bool(check_wheel.problems("conv_ops-0.1.0+cpu.whl", rest)) == needed, name


README_PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("program", README_PROGRAMS, ids=["eager", "torchscript", "converted"])
def test_programs_of_the_readme_run(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(program)
    runpy.run_path("program.py")


@pytest.mark.parametrize("name", ["eager", "torchscript", "converted", "im2col"])
def test_examples_run(name):
    runpy.run_path(str(ROOT / f"examples/{name}.py"))
