"""Skips the tests of this folder where there is no CUDA. ``make test-gpu`` shows the card to them."""

from __future__ import annotations

import os

import pytest
import torch

REHEARSAL = os.environ.get("REHEARSE_GPU_TESTS") == "1"
"""Whether the tests that have no part for CUDA alone run on CPU, to find mistakes in the tests."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = (
        "needs a graphics card: torch.cuda.is_available() is False; run `make test-gpu` where there is one"
    )
    for item in items:
        if "tests/gpu" in item.path.as_posix() and not (REHEARSAL and "cuda_only" not in item.keywords):
            item.add_marker(pytest.mark.skip(reason=reason))
