"""The norm of gradients of any kind, without loss of precision or range."""

from __future__ import annotations

import pytest
import torch

from hf_divguard.hf.losses import gradient_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_can_be_measured(dtype: torch.dtype) -> None:
    """Half precision is summed in single: 65504 is the largest number that it holds."""
    layer = torch.nn.Linear(3, 1, bias=False).to(dtype)
    layer.weight.grad = torch.full((1, 3), 60000.0, dtype=dtype)
    norm = gradient_norm(layer)
    assert norm is not None
    assert float(norm) == pytest.approx(60000.0 * 3**0.5, rel=0.01)


def test_sparse_gradients_can_be_measured() -> None:
    """A row that was looked up twice counts with the sum of both."""
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    norm = gradient_norm(table)
    assert norm is not None
    assert float(norm) == pytest.approx((2 * 2.0**2 + 2 * 1.0) ** 0.5)


def test_without_gradients_there_is_no_norm() -> None:
    """As before the first backward pass."""
    assert gradient_norm(torch.nn.Linear(1, 1)) is None
