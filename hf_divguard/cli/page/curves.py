"""Curves for a picture: few enough points, none of the extremes lost, and a scale with its ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Curve", "Scale", "thinned"]

_BUCKETS = 700
_MOST_BROKEN = 300
_MUCH = 20.0
_TINY, _HUGE = 1e-300, 1e300


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Args:
        name: Its log key.
        points: Steps and finite values, in the order of the steps.
        broken: Steps whose value is NaN or infinite.
        total: Number of values that were logged.
        n_broken: How many of them are NaN or infinite.
    """

    name: str
    points: list[tuple[int, float]]
    broken: list[int] = field(default_factory=list)
    total: int = 0
    n_broken: int = 0


def thinned(name: str, values: Sequence[tuple[int, float]]) -> Curve:
    """Return a curve of at most some 1,400 points: of each stretch the lowest and the highest value.

    Example:
        >>> curve = thinned("loss", [(step, 2.0 if step != 31_000 else 900.0) for step in range(100_000)])
        >>> len(curve.points) < 1500, max(value for _, value in curve.points), curve.total
        (True, 900.0, 100000)
    """
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    broken = [step for step, value in values if not math.isfinite(value)]
    n_broken = len(broken)
    if n_broken > _MOST_BROKEN:
        broken = [
            broken[int(place * (len(broken) - 1) / (_MOST_BROKEN - 1))] for place in range(_MOST_BROKEN)
        ]
    if len(finite) > 2 * _BUCKETS:
        kept: list[tuple[int, float]] = [finite[0]]
        for number in range(_BUCKETS):
            part = finite[number * len(finite) // _BUCKETS : (number + 1) * len(finite) // _BUCKETS]
            extremes = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
            kept += sorted(extremes)
        finite = [*kept, finite[-1]]
    return Curve(name, finite, broken, len(values), n_broken)


@dataclass(frozen=True)
class Scale:
    """An axis: its ends, whether it is logarithmic, and its ticks.

    Example:
        >>> scale = Scale.of([0.0, 9.0])
        >>> scale.ticks, round(scale.share(4.5), 2), scale.is_logarithmic
        ([0.0, 2.0, 4.0, 6.0, 8.0], 0.5, False)
        >>> Scale.of([0.001, 40.0]).ticks
        [0.001, 0.01, 0.1, 1.0, 10.0]
    """

    low: float
    high: float
    is_logarithmic: bool
    ticks: list[float]

    @classmethod
    def of(cls, values: Sequence[float], *, may_be_logarithmic: bool = True) -> Scale:
        """Return an axis for finite ``values``: logarithmic if they span a lot."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        low, high = max(low, -_HUGE), min(high, _HUGE)
        if low == high:
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        if may_be_logarithmic and low > 0 and high > _MUCH * low:
            low = max(low, _TINY)
            return cls(low, high, True, _decades(low, high))
        return cls(low, high, False, _even(low, high))

    def padded(self) -> Scale:
        """Return the same axis with a little room above and below, so that no line lies on an edge."""
        if self.is_logarithmic:
            room = math.exp(0.04 * (math.log(self.high) - math.log(self.low)))
            return Scale(max(self.low / room, _TINY), min(self.high * room, _HUGE), True, self.ticks)
        room = 0.04 * (self.high / 2 - self.low / 2)
        low = 0.0 if self.low >= 0.0 > self.low - room else self.low - room
        return Scale(low, self.high + room, False, self.ticks)

    def share(self, value: float) -> float:
        """Return where ``value`` lies between the ends, from 0 to 1."""
        if self.is_logarithmic:
            low = math.log(self.low)
            return (math.log(max(value, _TINY)) - low) / (math.log(self.high) - low)
        return (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)


def _even(low: float, high: float) -> list[float]:
    rough = (high / 5) - (low / 5)
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(
        (factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= 0.99 * rough), rough
    )
    first = math.ceil(low / width - 1e-9)
    return [
        float(f"{(first + n) * width:.12g}") for n in range(12) if (first + n) * width <= high + 1e-9 * width
    ]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    jump = max(1, -(-(last - first) // 5))
    factors = (1.0, 2.0, 5.0) if last - first < 2 else (1.0,)
    ticks = [factor * 10.0**power for power in range(first - 1, last + 1, jump) for factor in factors]
    return [float(f"{tick:.12g}") for tick in ticks if low * 0.999 <= tick <= high * 1.001]
