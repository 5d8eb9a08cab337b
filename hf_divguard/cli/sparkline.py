"""A curve in one line of characters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-=+*#@"


def sparkline(
    values: Sequence[float],
    width: int = 40,
    *,
    limits: tuple[float, float] | None = None,
    ascii_only: bool = False,
) -> str:
    """Return ``values`` as a line: the median of each stretch, ``!`` where one is not finite.

    Args:
        values: The values in their order.
        width: Most characters.
        limits: The values of the lowest and the highest bar; those of ``values`` if not given.
        ascii_only: Use ASCII characters alone.

    Example:
        >>> sparkline([1.0, 2.0, 3.0, 4.0]), sparkline([1.0, float("nan"), 8.0], ascii_only=True)
        ('▁▃▆█', '_!@')
    """
    if not values:
        return ""
    bars = _ASCII if ascii_only else _BARS
    count = min(width, len(values))
    parts = [values[n * len(values) // count : (n + 1) * len(values) // count] for n in range(count)]
    middles = [statistics.median(part) if all(map(math.isfinite, part)) else math.nan for part in parts]
    finite = [each for each in middles if math.isfinite(each)]
    low, high = limits or (min(finite, default=0.0), max(finite, default=0.0))
    shown = ""
    for each in middles:
        share = (each / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.0
        shown += "!" if not math.isfinite(each) else bars[min(7, max(0, round(7 * share)))]
    return shown
