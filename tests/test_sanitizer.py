"""Every kernel under compute-sanitizer: no invalid access, no race, no misused barrier."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_conv2d import ALGORITHMS

SANITIZER = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)

PROGRAM = """
import math, sys
import reference, torch
import conv_ops
from problems import CHANNELS_LAST, DEPTHWISE_TILES, FEW_A_GROUP, LARGE_KERNELS, ODD, Problem
ops = torch.ops.convops
algorithm, = sys.argv[1:]
# For implicit_gemm, whose code differs with what the source's rows, strides and channels allow.
dense = [
    Problem("bulk_copies", 2, 40, 12, 16, 72, (3, 3), padding=(1, 1), bias=True),
    Problem("odd_rows", 2, 40, 12, 15, 72, (3, 3), padding=(1, 1), bias=True),
    Problem("pointwise_wide", 2, 64, 8, 12, 136, (1, 1)),
    Problem("mixed_phases", 2, 24, 13, 14, 40, (3, 3), (2, 2), (1, 1)),
    Problem("one_phase_at_a_time", 2, 40, 13, 14, 136, (3, 3), (2, 2), (1, 1)),
    Problem("results_apart", 2, 24, 13, 14, 40, (3, 3), (3, 3), (1, 1)),
    Problem("tiles_across_images", 150, 16, 7, 7, 24, (3, 3), padding=(1, 1)),
    Problem("kinds_of_rows", 1, 16, 12, 68, 32, (3, 3), bias=True),
    Problem("patches", 2, 24, 12, 16, 40, (3, 3), (2, 2), (1, 1)),
    Problem("patches_in_a_vector", 2, 3, 20, 32, 24, (5, 5), (4, 4), (1, 1)),
    Problem("two_taps_of_patches", 2, 2, 24, 32, 24, (5, 5), (2, 2), (2, 2)),
    Problem("snug_cells", 2, 16, 12, 16, 24, (4, 4), (2, 2), (1, 1), bias=True),
    Problem("nan", 2, 20, 9, 20, 24, (3, 3), padding=(1, 1), bias=True),
]
# Every instruction takes some hundred times as long here.
few = [
    problem
    for problem in DEPTHWISE_TILES + LARGE_KERNELS + FEW_A_GROUP + CHANNELS_LAST
    if math.prod(problem.input_size) * math.prod(problem.kernel) < 200_000
]
with_tf32 = ("implicit_gemm", "implicit_gemm_weight", "grouped", "grouped_weight")
with_tf32 += ("tma_im2col", "tma_im2col_weight")
ran = 0
cases = [
    (problem, dtype, problem in CHANNELS_LAST)
    for problem in ODD + dense + few
    for dtype in (torch.float32, torch.bfloat16)
]
# Of 16 bits there are ways of their own for dense ones, of float32 in two algorithms.
cases += [(problem, torch.bfloat16, True) for problem in dense]
if algorithm.startswith("tma_im2col"):
    cases += [(problem, torch.float32, True) for problem in dense]
for problem, dtype, channels_last in cases:
    x, w, bias, dy = reference.operands(problem, dtype, "cuda")
    if channels_last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    if problem.name == "nan":  # what fp16 cannot hold is computed again by another kernel
        x[0, 0, 0, 0] = dy[0, 0, 0, 0] = math.nan
    window = (list(problem.stride), list(problem.padding_sides), list(problem.dilation))
    for precision in ("ieee", "tf32"):
        # The others have no kernels of their own for TF32.
        if precision == "tf32" and (algorithm not in with_tf32 or dtype != torch.float32):
            continue
        options = (*window, problem.groups, precision, algorithm)
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
@pytest.mark.parametrize("algorithm", ALGORITHMS["cuda"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_no_finding(tool: str, algorithm: str) -> None:
    if (tool, algorithm) == ("racecheck", "im2col_gemm"):
        pytest.skip("breaks inside cuBLAS's own kernels; ours of im2col_gemm share no memory")
    done = subprocess.run(
        [
            SANITIZER,
            f"--tool={tool}",
            "--kernel-name=kns=convops",  # torch's own kernels are not ours to check
            "--error-exitcode=9",
            sys.executable,
            "-c",
            PROGRAM,
            algorithm,
        ],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert "ERROR SUMMARY: 0 errors" in output or "0 hazards displayed" in output, output[-4000:]
    assert int(output.split("calls:")[1].split()[0]) > 10
