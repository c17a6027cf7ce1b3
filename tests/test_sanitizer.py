"""Every kernel under compute-sanitizer: no invalid access, no race, no misused barrier."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)

PROGRAM = """
import sys
import reference, torch
from conv_ops import _C
from problems import ODD
ops = torch.ops.convops
names = [entry["name"] for entry in _C.algorithms() if entry["device"] == "cuda"]
algorithms = [name for name in names if name not in sys.argv[1:]]
ran = 0
for problem in ODD:
    for dtype in (torch.float32, torch.bfloat16):
        x, w, bias, dy = reference.operands(problem, dtype, "cuda")
        window = (list(problem.stride), list(problem.padding_sides), list(problem.dilation))
        for algorithm in algorithms:
            options = (*window, problem.groups, "ieee", algorithm)
            for call in (
                lambda: ops.conv2d_forward(x, w, bias, *options),
                lambda: ops.conv2d_backward_input(dy, w, problem.input_size, *options),
                lambda: ops.conv2d_backward_weight(dy, x, problem.weight_size, [], *options),
            ):
                try:
                    call()
                    ran += 1
                except RuntimeError as error:
                    if "cannot run" not in str(error):
                        raise
torch.cuda.synchronize()
print("calls:", ran)
"""


@pytest.mark.skipif(
    SANITIZER is None or not torch.cuda.is_available(), reason="no compute-sanitizer or no GPU"
)
# racecheck breaks inside cuBLAS's own kernels; ours of im2col_gemm share no memory to race for.
@pytest.mark.parametrize(
    ("tool", "without"),
    [("memcheck", []), ("racecheck", ["im2col_gemm"]), ("synccheck", [])],
)
def test_no_finding(tool: str, without: list[str]) -> None:
    done = subprocess.run(
        [
            SANITIZER,
            f"--tool={tool}",
            "--kernel-name=kns=convops",  # torch's own kernels are not ours to check
            "--error-exitcode=9",
            sys.executable,
            "-c",
            PROGRAM,
            *without,
        ],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert "ERROR SUMMARY: 0 errors" in output or "0 hazards displayed" in output, output[-4000:]
    assert int(output.split("calls:")[1].split()[0]) > 100
