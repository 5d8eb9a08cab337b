"""The rows of a batch that kept weights find worse than the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_divguard.core.rollback.rows import MOST_PROBES, find_rows, or_infinity
from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.probes import probe

__all__ = ["row_count", "suspect_rows"]

logger = logging.getLogger(__name__)


def suspect_rows(
    host: Host, batches: list[Any], losses: Sequence[float], tensors: Mapping[str, torch.Tensor]
) -> tuple[list[dict[str, int]], int]:
    """Return micro-batch and position of each row that stands out, and how many probes it took.

    Few rows are compared with all others of the step. Else the micro-batch with the highest loss is searched first,
    and the next one, with the probes that are left, if no row of it stands out.

    Nothing is named where a batch cannot be divided by rows, where some rows have no loss of their own,
    or where a forward pass takes all ranks, which search in different rows.

    Args:
        host: The host.
        batches: The micro-batches, as the data loader gave them.
        losses: The loss of each with the kept weights.
        tensors: The kept parameters and buffers.
    """
    if engine_of(host).forwards_together:
        return [], 0
    found: list[dict[str, int]] = []
    probes = 0
    for places in _pools(batches, losses):
        calls = 0

        def loss(rows: Sequence[int], places: list[tuple[int, int]] = places) -> float:
            nonlocal calls
            calls += 1
            number = places[rows[0]][0]
            return probe(host, [_rows_of(batches[number], [places[row][1] for row in rows])], None, tensors)[
                0
            ]

        try:
            rows = find_rows(len(places), loss, most_probes=MOST_PROBES - probes)
        except Exception as error:
            # A loss of its own need not exist, as where rows are compared with each other.
            logger.warning(
                "No rows are named in a batch with a high loss: that of some rows could not be computed (%s: %s).",
                type(error).__name__,
                error,
            )
            return found, probes + calls
        found = [{"micro_batch": places[row][0], "row": places[row][1]} for row in rows]
        probes += calls
        if found:
            break
    return found, probes


def _pools(batches: list[Any], losses: Sequence[float]) -> list[list[tuple[int, int]]]:
    """Return the rows that are searched together, as micro-batch and position."""
    by_batch = [[(number, row) for row in range(row_count(each) or 0)] for number, each in enumerate(batches)]
    all_rows = [place for places in by_batch for place in places]
    if len(all_rows) <= MOST_PROBES:
        return [all_rows]  # each of them has a probe of its own
    worst_first = sorted(range(len(batches)), key=lambda number: or_infinity(losses[number]), reverse=True)
    return [by_batch[number] for number in worst_first]


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
