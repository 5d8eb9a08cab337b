"""The rows of a batch that kept weights find worse than the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_divguard.core.rollback.rows import MOST_PROBES, find_rows
from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.probes import probe

__all__ = ["row_count", "suspect_rows"]

logger = logging.getLogger(__name__)


def suspect_rows(
    host: Host, batches: list[Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[list[dict[str, int]], int]:
    """Return micro-batch and position of each row that stands out, and how many probes it took.

    Nothing is named where a batch cannot be divided by rows, where some rows have no loss of their own,
    or where a forward pass takes all ranks, which search in different rows.

    Args:
        host: The host.
        batches: The micro-batches, as the data loader gave them.
        tensors: The kept parameters and buffers.
    """
    if engine_of(host).forwards_together:
        return [], 0
    found: list[dict[str, int]] = []
    probes = 0
    for number, inputs in enumerate(batches):
        count = row_count(inputs)
        if count is None:
            continue
        calls = 0

        def loss(rows: Sequence[int], inputs: Any = inputs) -> float:
            nonlocal calls
            calls += 1
            return probe(host, [_rows_of(inputs, rows)], None, tensors)[0]

        try:
            rows = find_rows(count, loss, most_probes=(MOST_PROBES - probes) // (len(batches) - number))
        except Exception as error:
            # A loss of its own need not exist, as where rows are compared with each other.
            logger.warning(
                "No rows are named in a batch with a high loss: that of some rows could not be computed (%s: %s).",
                type(error).__name__,
                error,
            )
            return found, probes + calls
        found += [{"micro_batch": number, "row": row} for row in rows]
        probes += calls
    return found, probes


def row_count(inputs: Any) -> int | None:
    """Return the number of rows of a micro-batch, ``None`` where it cannot be divided by rows."""
    if not isinstance(inputs, Mapping):
        return None
    sizes = {len(value) for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


def _rows_of(inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    chosen = list(rows)
    return {
        name: value[chosen] if isinstance(value, torch.Tensor) and value.dim() > 0 else value
        for name, value in inputs.items()
    }
