"""Fails if a wheel lacks a library of conv_ops or holds anything but the package.

Usage: python scripts/check_wheel.py WHEEL
"""

from __future__ import annotations

import re
import sys
import zipfile

REQUIRED = [r"__init__\.py", r"py\.typed", r"libconvops\.so", r"libconvops_autograd_t\d+\.so"]
REQUIRED += [r"_C\.[\w-]+\.so"]
REQUIRED_WITH_CUDA = [r"libconvops_cuda\.so"]
ALLOWED = [*REQUIRED, r"\w+\.pyi?"]


def problems(wheel: str, names: list[str]) -> list[str]:
    """Returns what is wrong with the files of a wheel, one sentence each."""
    required, allowed = REQUIRED, ALLOWED
    if "+cu" in wheel:
        required, allowed = required + REQUIRED_WITH_CUDA, allowed + REQUIRED_WITH_CUDA
    names = [name for name in names if ".dist-info/" not in name]

    def matches(pattern: str, name: str) -> bool:
        return re.fullmatch(f"conv_ops/{pattern}", name) is not None

    return [
        f"no file conv_ops/{pattern}"
        for pattern in required
        if not any(matches(pattern, name) for name in names)
    ] + [
        f"stray file {name}"
        for name in names
        if not any(matches(pattern, name) for pattern in allowed)
    ]


if __name__ == "__main__":
    for wheel in sys.argv[1:]:
        with zipfile.ZipFile(wheel) as archive:
            wrong = problems(wheel, archive.namelist())
        if wrong:
            sys.exit(f"{wheel}: " + "; ".join(wrong))
        print(f"{wheel}: nothing missing, nothing stray")
