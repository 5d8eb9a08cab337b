"""Two moving windows: fires when the mean of the short one runs away from that of the long one."""

from __future__ import annotations

import math
import warnings
from collections import deque
from typing import Any

from hf_divguard.core.detection.detector import non_finite_finding
from hf_divguard.core.findings import Finding

__all__ = ["DualWindowRule"]

# Every finite float is a whole multiple of 2**-1074, so a sum of floats kept as an integer in that unit is
# exact: adding the new value and taking the oldest one away never drifts, and a sum rebuilt from a saved
# buffer is the same number to the last bit.
_UNIT = 1 << 1074


def _in_units(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()
    return numerator << (1075 - denominator.bit_length())


class DualWindowRule:
    """Compare the means of the last few and of the last many values of one series.

    Silent until the long window is full. Then fires on every value for which
    ``mean(short) - mean(long) >= threshold`` (with ``greater_is_better`` the other way
    round). Each update takes the same time however long the windows are, and the sums
    are exact: nothing drifts, however many values pass through.

    Args:
        short_window: Number of values in the short window, at least 1. Counted in
            observed values (log events), not in optimizer steps.
        long_window: Number of values in the long window, at least 1.
        threshold: Smallest gap that fires, in the units of the metric. Larger is quieter.
        metric: Log key of the series, for messages.
        greater_is_better: Whether a *drop* of the metric is the trouble.

    Raises:
        ValueError: If a window is shorter than 1 or ``threshold`` is not a finite number.
        TypeError: If a window is not a whole number.

    Example:
        >>> rule = DualWindowRule(short_window=2, long_window=4, threshold=1.0)
        >>> findings = [rule.observe(step, 2.0 if step < 5 else 6.0) for step in range(9)]
        >>> [finding.step for finding in findings if finding]
        [5, 6, 7]
    """

    def __init__(
        self,
        short_window: int = 10,
        long_window: int = 100,
        threshold: float = 2.0,
        *,
        metric: str = "loss",
        greater_is_better: bool = False,
    ) -> None:
        for name, window in (("short_window", short_window), ("long_window", long_window)):
            if not isinstance(window, int) or isinstance(window, bool):
                raise TypeError(f"`{name}` must be a whole number of values, got {window!r}.")
            if window < 1:
                raise ValueError(f"`{name}` must be at least 1 value, got {window!r}.")
        if not math.isfinite(threshold):
            raise ValueError(f"`threshold` must be a finite number, got {threshold!r}.")
        if short_window >= long_window:
            warnings.warn(
                f"`short_window={short_window}` should be smaller than `long_window={long_window}`: the short "
                "window has to react faster than the long one, otherwise a rise is never seen.",
                UserWarning,
                stacklevel=2,
            )
        self.short_window = short_window
        self.long_window = long_window
        self.threshold = threshold
        self.metric = metric
        self.greater_is_better = greater_is_better
        self.reset()

    def reset(self) -> None:
        """Forget everything that was observed."""
        self._short: deque[int] = deque()
        self._long: deque[int] = deque()
        self._short_sum = 0
        self._long_sum = 0

    def observe(self, step: int, value: float) -> Finding | None:
        """Feed one value; return a finding while the gap is at or above the threshold."""
        if not math.isfinite(value):
            return non_finite_finding(self.metric, step, value)
        units = _in_units(float(value))
        self._short.append(units)
        self._short_sum += units
        if len(self._short) > self.short_window:
            self._short_sum -= self._short.popleft()
        self._long.append(units)
        self._long_sum += units
        if len(self._long) > self.long_window:
            self._long_sum -= self._long.popleft()
        elif len(self._long) < self.long_window:
            return None
        short_mean = self._short_sum / (len(self._short) * _UNIT)
        long_mean = self._long_sum / (self.long_window * _UNIT)
        gap = long_mean - short_mean if self.greater_is_better else short_mean - long_mean
        if gap < self.threshold:
            return None
        return self._finding(step, value, short_mean, long_mean, gap)

    def _finding(self, step: int, value: float, short_mean: float, long_mean: float, gap: float) -> Finding:
        moved, sign = ("fallen", -1.0) if self.greater_is_better else ("risen", 1.0)
        return Finding(
            step=step,
            onset_step=step,
            kind="drop" if self.greater_is_better else "jump",
            severity="error",
            metric=self.metric,
            value=value,
            limit=long_mean + sign * self.threshold,
            message=(
                f"`{self.metric}` = {value:.4g} at step {step} has {moved}: the mean {short_mean:.4g} of its last "
                f"{len(self._short)} values is {gap:.4g} away from the mean {long_mean:.4g} of its last "
                f"{self.long_window} (limit {self.threshold:.4g})."
            ),
            evidence={"short_mean": short_mean, "long_mean": long_mean, "gap": gap},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return ``short_buffer`` and ``long_buffer``, oldest value first."""
        return {
            "short_buffer": [units / _UNIT for units in self._short],
            "long_buffer": [units / _UNIT for units in self._long],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over both buffers; where a window is shorter now, its newest values.

        Raises:
            ValueError: If a buffer is missing or holds anything but finite numbers.
        """
        buffers = {}
        for name, window in (("short_buffer", self.short_window), ("long_buffer", self.long_window)):
            values = state_dict.get(name)
            if not isinstance(values, (list, tuple)):
                raise ValueError(
                    f"The state of the two windows needs a list `{name}`; it holds {sorted(state_dict)}."
                )
            if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                raise ValueError(f"`{name}` must hold finite numbers only, got {values!r}.")
            buffers[name] = deque(_in_units(float(v)) for v in values[-window:])
        self._short, self._long = buffers["short_buffer"], buffers["long_buffer"]
        self._short_sum, self._long_sum = sum(self._short), sum(self._long)
