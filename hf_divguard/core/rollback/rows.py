"""Which rows of a batch make its loss high, found with few probes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from hf_divguard.core.detection.sorted_window import median

__all__ = ["MOST_PROBES", "bar_of", "find_rows", "or_infinity"]

MOST_PROBES = 16
_GROUPS = 8
# Spreads of the other groups above their middle, and part of it, from which a group is divided further.
_SPREADS = 3.5
_SPREADS_OF_ROWS = 6.0
_SHARE = 0.15
_MAD = 1.4826
# A single row is named only if its loss is so many times that of the others: rows differ more than groups.
_ROW_FACTOR = 2.0

Loss = Callable[[Sequence[int]], float]


def find_rows(count: int, loss: Loss, *, most_probes: int = MOST_PROBES) -> list[int]:
    """Return the rows whose loss stands out from that of the others.

    The rows are probed in groups; a group that stands out is divided further. Where more than
    every fourth group stands out none does: then the batch as a whole is different.

    Args:
        count: Number of rows.
        loss: Returns the mean loss of some rows.
        most_probes: How often it may be called.

    Example:
        >>> find_rows(64, lambda rows: sum(9.0 if row == 37 else 1.5 + row % 3 / 10 for row in rows) / len(rows))
        [37]
        >>> find_rows(64, lambda rows: 9.0)
        []
    """
    groups = _divide(range(count), count if count <= most_probes else _GROUPS)
    if len(groups) < 4 or len(groups) > most_probes:
        return []
    left = most_probes - len(groups)
    losses = [loss(group) for group in groups]
    spreads = _SPREADS_OF_ROWS if len(groups) == count else _SPREADS
    limits = [_limit([*losses[:place], *losses[place + 1 :]], spreads) for place in range(len(losses))]
    bar = bar_of(losses)
    high = [
        (value, group)
        for value, group, limit in zip(losses, groups, limits, strict=True)
        if not value <= limit and or_infinity(value) >= bar
    ]
    if not high or 4 * len(high) > len(groups):
        return []
    usual = median(value for value, limit in zip(losses, limits, strict=True) if value <= limit)
    found: dict[int, float] = {}
    for value, group in sorted(high, key=lambda each: -or_infinity(each[0])):
        rows, used = _narrow(list(group), value, loss, usual, left)
        left -= used
        found |= rows
    bar = bar_of([usual, *found.values()])
    return sorted(row for row, value in found.items() if or_infinity(value) >= bar)


def bar_of(losses: Sequence[float]) -> float:
    """Return what counts beside the worst loss: what lies only somewhat above the others says nothing."""
    lowest = min(map(or_infinity, losses))
    worst = max(map(or_infinity, losses))
    return worst if lowest == worst else lowest + _SHARE * (worst - lowest)


def or_infinity(loss: float) -> float:
    """Return a loss, infinity where it is not a number, so that it can be compared."""
    return loss if math.isfinite(loss) else math.inf


def _narrow(
    group: list[int], value: float, loss: Loss, usual: float, left: int
) -> tuple[dict[int, float], int]:
    """Return the worst row of a group that stands out with its loss, if the probes suffice, and how many were used."""
    used = 0
    while len(group) > 1:
        parts = _divide(group, len(group) if len(group) <= left - used else 2)
        if used + len(parts) > left:
            return {}, used
        losses = [loss(part) for part in parts]
        used += len(parts)
        worst = max(
            range(len(parts)), key=lambda place: losses[place] if losses[place] == losses[place] else math.inf
        )
        if losses[worst] <= usual * (1.0 + _SHARE):
            return {}, used
        group, value = list(parts[worst]), losses[worst]
    return ({} if value <= _ROW_FACTOR * usual else {group[0]: value}), used


def _limit(others: list[float], spreads: float) -> float:
    finite = [each for each in others if math.isfinite(each)]
    if not finite:
        return math.inf
    middle = median(finite)
    spread = _MAD * median(abs(each - middle) for each in finite)
    return middle + max(spreads * spread, _SHARE * abs(middle))


def _divide(rows: Sequence[int], parts: int) -> list[Sequence[int]]:
    size, more = divmod(len(rows), parts)
    ends = [0]
    for place in range(parts):
        ends.append(ends[-1] + size + (place < more))
    return [rows[start:end] for start, end in itertools.pairwise(ends) if end > start]
