"""A curve drawn with characters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["draw"]

_WIDTH, _HEIGHT = 72, 10


def draw(
    values: Sequence[tuple[int, float]], marks: Sequence[tuple[int, str]], *, ascii_only: bool = False
) -> str:
    """Return a picture of ``values``: the median of each column, on a logarithmic scale if they span a lot.

    Args:
        values: Steps and values. Those that are not finite stand at the top as ``!``.
        marks: Steps to mark below the curve, each with its letter.
        ascii_only: Draw with ASCII characters alone.

    Example:
        >>> print(draw([(step, 10.0 - step) for step in range(1, 10)], [(5, "o")], ascii_only=True))  # doctest: +ELLIPSIS
        9 |...
    """
    if not values:
        return "There is nothing to draw."
    first, last = values[0][0], max(step for step, _ in values)
    width = min(_WIDTH, max(1, last - first + 1))
    columns: list[list[float]] = [[] for _ in range(width)]

    def column(step: int) -> int:
        return min(width - 1, max(0, (step - first) * width // max(1, last - first + 1)))

    for step, value in values:
        columns[column(step)].append(value)
    finite = [value for _, value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    is_log = low > 0 and high / low > 20
    levels = [_level(column_values, low, high, is_log) for column_values in columns]
    point = "*" if ascii_only else "•"
    labels = {_HEIGHT - 1: f"{high:.3g}", 0: f"{low:.3g}"}
    margin = max(map(len, labels.values()))
    lines = []
    for row in range(_HEIGHT - 1, -1, -1):
        cells = "".join(
            "!" if level == math.inf and row == _HEIGHT - 1 else point if level == row else " "
            for level in levels
        )
        lines.append(f"{labels.get(row, ''):>{margin}} |{cells}".rstrip())
    below = [" "] * width
    for step, letter in marks:
        below[column(step)] = letter
    lines.append(f"{'':>{margin}} +{'-' * width}")
    if marks:
        lines.append(f"{'':>{margin}}  {''.join(below)}".rstrip())
    scale = ", logarithmic" if is_log else ""
    lines.append(f"{'':>{margin}}  steps {first} to {last}{scale}")
    return "\n".join(lines)


def _level(values: list[float], low: float, high: float, is_log: bool) -> float | None:
    """Return the row of a column, infinity if it holds nothing finite, ``None`` if it holds nothing."""
    if not values:
        return None
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        return math.inf
    middle = statistics.median(finite)
    if high <= low:
        return 0
    if is_log:
        share = math.log(middle / low) / math.log(high / low)
    else:
        share = (middle - low) / (high - low)
    return round(share * (_HEIGHT - 1))
