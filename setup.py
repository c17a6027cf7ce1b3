"""Builds the libraries of conv_ops. PyTorch must be installed first; it decides what is built.

| library                     | sources                         | linked with               |
|-----------------------------|---------------------------------|---------------------------|
| libconvops                  | csrc/*.cpp, csrc/cpu/*.cpp      | libtorch (stable ABI)     |
| libconvops_cuda             | csrc/cuda/*.cu, csrc/cuda/*.cpp | libconvops, CUDA, cuBLAS  |
| libconvops_autograd_t<m><n> | csrc/autograd.cpp               | libconvops, libtorch m.n  |
| _C                          | csrc/module.cpp                 | libconvops, Python        |

Sources are found by their place: a new file needs no change here. A file named `*_sm90.cu` is
compiled for 9.0a alone, every other .cu file for the architectures of TORCH_CUDA_ARCH_LIST: to PTX
for 9.0 and once for all others, then to the machine code of each.

Environment:
    CONVOPS_CUDA: "1" demands libconvops_cuda, "0" leaves it out, "auto" (default) builds it where
        PyTorch has CUDA and nvcc is found. Never depends on a GPU being present.
    CUDA_HOME: the CUDA toolkit (default: nvcc's PyPI package, /usr/local/cuda, nvcc on PATH).
    TORCH_CUDA_ARCH_LIST: architectures (default: ARCHITECTURES below).
    MAX_JOBS: how many files are compiled at a time.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
except ImportError:
    sys.exit(
        "conv_ops is compiled against the PyTorch at hand, and there is none in this environment. "
        "Install torch >= 2.11 first, then: "
        'pip install "setuptools>=77" wheel pybind11 ninja && pip install --no-build-isolation .'
    )

ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"  # what is compiled for 8.0 runs on 8.6 and 8.9 as it is
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020B000000000000")  # PyTorch 2.11 and everything later


def find_cuda_home() -> Path | None:
    """Returns the toolkit to compile with: CUDA_HOME if it is set, else the first that has nvcc."""
    if home := os.environ.get("CUDA_HOME"):
        places = [Path(home)]
    else:
        places = [nvidia_wheels(), Path("/usr/local/cuda")]
        if on_path := shutil.which("nvcc"):
            places.append(Path(on_path).resolve().parents[1])
    return next((place for place in places if (place / "bin/nvcc").is_file()), None)


def nvidia_wheels() -> Path:
    """Returns where NVIDIA's PyPI packages of PyTorch's CUDA version lie, or would lie."""
    major = (torch.version.cuda or "none").split(".")[0]
    return Path(torch.__file__).parents[1] / "nvidia" / f"cu{major}"


def wants_cuda(home: Path | None) -> bool:
    """Decides by CONVOPS_CUDA and by what is installed whether libconvops_cuda is built."""
    mode = os.environ.get("CONVOPS_CUDA", "auto")
    if mode not in ("0", "1", "auto"):
        sys.exit(f"CONVOPS_CUDA must be 0, 1 or auto, got {mode!r}")
    missing = []
    if torch.version.cuda is None:
        missing.append(f"PyTorch {torch.__version__} is a build without CUDA: install one with it")
    elif home is None:
        missing.append(
            f"no nvcc (CUDA_HOME={os.environ.get('CUDA_HOME', '')!r}): install the CUDA "
            f"{torch.version.cuda} toolkit, or from PyPI nvidia-cuda-nvcc, nvidia-cuda-crt, "
            f"nvidia-nvvm and nvidia-cuda-cccl, each =={torch.version.cuda}.*"
        )
    if mode == "1" and missing:
        sys.exit("CONVOPS_CUDA=1, but " + "; ".join(missing))
    if mode == "auto" and missing:
        print("conv_ops: building for the CPU only:", "; ".join(missing))
    return mode != "0" and not missing


def gencode(architectures: str) -> list[str]:
    """Returns nvcc's flags for such a TORCH_CUDA_ARCH_LIST; none, so PyTorch's, if it has names.

    PTX takes as long to make as machine code of it. Hopper has its own, because the kernels are
    tuned for it, and so has what asks for it by a letter; the others share that of the oldest.
    """
    listed = architectures.replace(".", "").replace(";", " ").split()
    numbers = [entry.removesuffix("+PTX") for entry in listed]
    if not all(re.fullmatch(r"\d+[af]?", number) for number in numbers):
        return []
    shared = [number for number in numbers if number.isdecimal() and number != "90"]
    flags = []
    for entry, number in zip(listed, numbers, strict=True):
        ptx = min(shared, key=int) if number in shared else number
        codes = [f"sm_{number}", f"compute_{ptx}"][: 2 if entry.endswith("+PTX") else 1]
        flags += [f"-gencode=arch=compute_{ptx},code={code}" for code in codes]
    return flags


cuda_home = find_cuda_home()
with_cuda = wants_cuda(cuda_home)
if with_cuda:  # all read by cpp_extension, the first when it is imported
    os.environ["CUDA_HOME"] = str(cuda_home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    os.environ.setdefault("PYTORCH_NVCC", os.path.abspath("scripts/nvcc_strict.sh"))
# ninja from PyPI lies beside this Python, whose environment need not be activated.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

import pybind11  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths  # noqa: E402

VERSION = re.search(r'^__version__ = "(.+)"$', Path("conv_ops/__init__.py").read_text(), re.M)[1]
LOCAL = f"cu{torch.version.cuda.replace('.', '')}" if with_cuda else "cpu"
TORCH_MINOR = "".join(torch.__version__.split(".")[:2])
# One build directory for each configuration: nothing stale ends up in another one's wheel.
BUILD = Path("build") / f"{sys.implementation.cache_tag}-torch{torch.__version__}-{LOCAL}"


class Build(BuildExtension):
    """Names libraries plainly, links them to each other, knows what to compile for what."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Editable installs build in a temporary directory; a fixed one keeps them incremental.
        self.build_temp = str(BUILD / "objects")

    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        if name.startswith("lib"):
            return os.path.join(*package, f"{name}.so")
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        objects = self.build_temp
        self.build_temp = os.path.join(objects, ext.name)  # each has a ninja file of its own
        ext.library_dirs.append(os.path.dirname(self.get_ext_fullpath(ext.name)))
        if hopper := [source for source in ext.sources if source.endswith("_sm90.cu")]:
            ext.sources = [source for source in ext.sources if source not in hopper]
            args = ext.extra_compile_args
            ext.extra_objects += self.compiler.compile(
                hopper,
                output_dir=os.path.join(self.build_temp, "sm90"),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs={**args, "nvcc": args["nvcc"] + gencode("9.0a")},
            )
            args["nvcc"] += gencode(os.environ["TORCH_CUDA_ARCH_LIST"])
        super().build_extension(ext)
        self.build_temp = objects


def library(
    name: str,
    sources: list[str],
    libraries: list[str],
    *,
    macros: Sequence[tuple[str, str | None]] = (),
    include_dirs: Sequence[str] = (),
    library_dirs: Sequence[str] = (),
    cxx: Sequence[str] = (),
    nvcc: Sequence[str] = (),
) -> Extension:
    """Returns one library of the package, with what all of them share."""
    return Extension(
        f"conv_ops.{name}",
        sources,
        language="c++",
        define_macros=[("CONVOPS_VERSION", f'"{VERSION}"'), *macros],
        include_dirs=[os.path.abspath("csrc"), *include_dirs],
        library_dirs=[*library_paths(), *library_dirs],
        libraries=libraries,
        extra_compile_args={"cxx": ["-O3", "-g0", "-Wall", *cxx], "nvcc": list(nvcc)},
        extra_link_args=["-Wl,-rpath,$ORIGIN"],
    )


def sources(*patterns: str, but: Sequence[str] = ()) -> list[str]:
    """Returns the files under csrc/ that match a pattern, in a fixed order."""
    found = (path for pattern in patterns for path in Path("csrc").glob(pattern))
    return sorted(str(path) for path in found if path.name not in but)


extensions = [
    library(
        "libconvops",
        sources("*.cpp", "cpu/*.cpp", but=("module.cpp", "autograd.cpp")),
        libraries=["c10", "torch_cpu", "torch"],
        macros=[STABLE_ABI],
        include_dirs=include_paths(),
        cxx=["-std=c++20", "-fopenmp-simd"],
    )
]
if with_cuda:
    major = torch.version.cuda.split(".")[0]
    # The toolkit comes first, the wheels' directories last: there, only cuBLAS may be wanted. The
    # wheels have no unversioned lib*.so; at run time PyTorch has loaded both libraries already.
    toolkits = [cuda_home, nvidia_wheels()]
    extensions.append(
        library(
            "libconvops_cuda",
            sources("cuda/*.cu", "cuda/*.cpp"),
            libraries=[
                *("convops", "c10", "torch_cpu", "torch_cuda", "torch"),
                *(f":libcudart.so.{major}", f":libcublas.so.{major}"),
            ],
            macros=[
                STABLE_ABI,
                ("USE_CUDA", None),
                ("CONVOPS_CUDA_VERSION", f'"{torch.version.cuda}"'),
                ("CONVOPS_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
            ],
            include_dirs=[*include_paths(), *(f"{home}/include" for home in toolkits)],
            library_dirs=[f"{home}/{lib}" for home in toolkits for lib in ("lib64", "lib")],
            cxx=["-std=c++20"],
            nvcc=["-O3", "-std=c++20", "--threads=2", "-Xptxas=-warn-spills,-Werror"],
        )
    )
extensions += [
    library(  # the C++ standard is the one that PyTorch's own headers ask for
        f"libconvops_autograd_t{TORCH_MINOR}",
        sources("autograd.cpp"),
        libraries=["convops", "c10", "torch_cpu", "torch"],
        include_dirs=include_paths(),
    ),
    library(
        "_C",
        sources("module.cpp"),
        libraries=["convops"],
        include_dirs=[pybind11.get_include()],
        cxx=["-std=c++20"],
    ),
]

setup(
    version=f"{VERSION}+{LOCAL}",
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={"build": {"build_base": str(BUILD)}},
)
