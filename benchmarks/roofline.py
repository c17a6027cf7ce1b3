"""Calls every dense KernelBench problem once, for Nsight Compute to measure its kernel.

    ncu --section SpeedOfLight --section ComputeWorkloadAnalysis \\
        --section MemoryWorkloadAnalysis \\
        --metrics dram__bytes.sum,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed \\
        -k regex:implicit_gemm_kernel --page raw --csv python -m benchmarks.roofline

The kernels follow each other in the order that is printed. What they showed on an H200:
``docs/implicit_gemm_measurements.md``.
"""

from __future__ import annotations

import torch

from benchmarks.cases import Case, select
from benchmarks.contestants import convops

PROBLEMS = ("kb55", "kb63", "kb62", "kb56", "kb80", "kb50", "kb87")


def main() -> None:
    """Calls ``implicit_gemm`` forward and backward-input, in IEEE and TF32."""
    for problem in select(PROBLEMS):
        for direction in ("forward", "backward_input"):
            for precision in ("ieee", "tf32"):
                case = Case(problem, direction, precision, "nchw", torch.device("cuda"))
                tensors = case.tensors()
                convops(case, tensors, "implicit_gemm").call()
                torch.cuda.synchronize()
                print(problem.name, direction, precision, flush=True)
                del tensors
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
