"""Fixtures of all tests: each runs on the CPU and, where there is one, on the GPU."""

from __future__ import annotations

import os
import tempfile

# Before anything reads it: no test may touch the user's tuned choices.
os.environ["CONVOPS_CACHE_DIR"] = tempfile.mkdtemp(prefix="conv_ops_test_cache_")

import pytest
import torch

import conv_ops  # noqa: F401  (registers the ops)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """The device a test runs on."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
