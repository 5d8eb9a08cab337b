"""A loss that rises from its first values on, so that there is no normal range to compare it with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_divguard.core.detection.sorted_window import median
from hf_divguard.core.findings import Finding
from hf_divguard.core.state import Stateful, memory

__all__ = ["FirstRise"]

# docs/detectors.md gives the source of each number.
RISE_FACTOR = 15.0
RISE_VALUES = 20
FEWEST_VALUES = 6
LAST_VALUES = 3
LATE_SHARE = 0.5


@dataclass
class FirstRise(Stateful):
    """Report a loss that is fifteen times its beginning after few values, and grows on.

    The growth must go on at the end: the logarithm has to rise in the later half of the
    values at least half as much as in the earlier half. A distance to a reference, which a
    policy gradient may add, grows fast from about zero and then ever less.

    Example:
        >>> rise = FirstRise()
        >>> [rise.observe(1.6**step) for step in range(9)].index(True)
        7
    """

    _values: list[float] = memory(list)
    _is_over: bool = memory(False)

    def observe(self, value: float) -> bool:
        """Take the next value; return whether the loss has risen so far."""
        values = self._values
        if self._is_over or value <= 0.0 or len(values) >= RISE_VALUES:
            # Below zero it has no size to be a multiple of; later the normal range is known.
            self.end()
            return False
        values.append(value)
        if len(values) < FEWEST_VALUES or value < RISE_FACTOR * self.first:
            return False
        if min(values[-LAST_VALUES:]) < max(RISE_FACTOR / 3.0 * self.first, *values[:-LAST_VALUES]):
            return False  # a single value is a spike
        middle = values[len(values) // 2]
        return math.log(value / middle) >= LATE_SHARE * math.log(middle / values[0])

    @property
    def is_over(self) -> bool:
        """Whether nothing is judged any more."""
        return self._is_over

    @property
    def first(self) -> float:
        """The level of the first values."""
        return median(self._values[:LAST_VALUES])

    def finding(self, step: int, value: float, metric_key: str) -> Finding:
        """Return the finding at the value that was just reported."""
        first = self.first
        return Finding(
            step=step,
            onset_step=1,
            kind="climb",
            severity="error",
            metric=metric_key,
            value=value,
            limit=RISE_FACTOR * first,
            message=(
                f"`{metric_key}` = {value:.4g} at step {step} has climbed since the first values, from {first:.4g} to "
                f"{value / first:.3g} times as much."
            ),
            evidence={"before": first, "now": value},
        )

    def end(self) -> None:
        """Judge no more."""
        self._is_over, self._values = True, []
