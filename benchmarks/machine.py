"""Where the numbers come from: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import conv_ops
from benchmarks.cases import ROOT

_GPU_STATE = "driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def gpu_state(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power and temperature as nvidia-smi tells them now."""
    if device.type != "cuda":
        return None
    # nvidia-smi counts all GPUs, PyTorch the visible ones: only the UUID means the same to both.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = f"--query-gpu={_GPU_STATE}"
    line = _output("nvidia-smi", f"--id={uuid}", query, "--format=csv,noheader")
    return dict(zip(_GPU_STATE.split(","), line.split(", "), strict=True)) if line else None


def commit() -> str:
    """The checkout's commit, "+" where files differ from it, or "unknown"."""
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _output("git", "status", "--porcelain", "-uno") else "")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe(device: torch.device, commit_given: str | None) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_given or commit(),
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu_state": gpu_state(device),
        "versions": {
            "conv_ops": conv_ops.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
            "python": platform.python_version(),
        },
        "build": conv_ops._C.build_info(),
    }
