"""Two moving windows: fires when the mean of the short one moves away from that of the long one."""

from __future__ import annotations

import math
import warnings
from collections import deque
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from hf_divguard.core.detection.detector import check_setting, non_finite_finding
from hf_divguard.core.detection.gap import GapRule
from hf_divguard.core.findings import Finding
from hf_divguard.core.state import memory

__all__ = ["DualWindowRule"]

# Every finite float is an integer multiple of 2**-1074, so a sum of floats kept as an integer in that unit is
# exact: adding the new value and taking the oldest one away never drifts, and a sum rebuilt from a saved
# buffer is the same number to the last bit.
_UNIT = 1 << 1074


def _in_units(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()
    return numerator << (1075 - denominator.bit_length())


@dataclass
class DualWindowRule(GapRule):
    """Compare the means of the last few and of the last many values of one series.

    Silent until the long window is full. Then fires on every value for which
    ``mean(short) - mean(long) >= threshold`` (with ``greater_is_better`` the other way
    round). Each update takes the same time however long the windows are, and the sums
    are exact: nothing drifts, however many values pass through.

    The memory is ``short_buffer`` and ``long_buffer``, lists with the oldest value first.
    Loaded buffers stay as they are until the next value shortens them to their windows.

    Args:
        short_window: Number of values in the short window, at least 1. Counted in
            observed values (log events), not in optimizer steps.
        long_window: Number of values in the long window, at least 1.
        threshold: Smallest gap that fires, above 0, in the units of the metric. Larger is
            quieter.
        metric_key: Log key of the series, for messages.
        greater_is_better: Whether a *drop* of the metric is bad.

    Raises:
        ValueError: If a window is shorter than 1, or ``threshold`` is not above 0 and finite.
        TypeError: If a window is not a whole number, or ``threshold`` not a number.

    Example:
        >>> rule = DualWindowRule(short_window=2, long_window=4, threshold=1.0)
        >>> findings = [rule.observe(step, 2.0 if step < 5 else 6.0) for step in range(9)]
        >>> [finding.step for finding in findings if finding]
        [5, 6, 7]
    """

    name: ClassVar[str] = "window"
    averages: ClassVar[tuple[str, str]] = ("short_mean", "long_mean")

    short_window: int = 10
    long_window: int = 100
    threshold: float = 2.0
    _: KW_ONLY
    metric_key: str = "loss"
    greater_is_better: bool = False

    _short_buffer: deque[float] = memory(deque)
    _long_buffer: deque[float] = memory(deque)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self.name, "short_window", self.short_window, at_least=1, unit="value")
        check_setting(self.name, "long_window", self.long_window, at_least=1, unit="value")
        if self.short_window >= self.long_window:
            warnings.warn(
                f"`short_window={self.short_window}` should be smaller than `long_window={self.long_window}`: the "
                "short window has to react faster than the long one, otherwise a rise is never seen.",
                UserWarning,
                stacklevel=3,
            )
        self._short_sum = self._long_sum = 0

    @property
    def short_buffer(self) -> list[float]:
        """Values in the short window, oldest first."""
        return list(self._short_buffer)

    @property
    def long_buffer(self) -> list[float]:
        """Values in the long window, oldest first."""
        return list(self._long_buffer)

    def reset(self) -> None:
        """Forget everything that was observed."""
        super().reset()
        self._short_sum = self._long_sum = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over both buffers exactly as they are.

        Raises:
            StateError: If a buffer is missing or holds anything but finite numbers.
        """
        super().load_state_dict(state_dict)
        self._short_sum = sum(map(_in_units, self._short_buffer))
        self._long_sum = sum(map(_in_units, self._long_buffer))

    def observe(self, step: int, value: float) -> Finding | None:
        """Feed one value; return a finding while the gap is at or above the threshold."""
        if not math.isfinite(value):
            return non_finite_finding(self.metric_key, step, value)
        value = float(value)
        self._short_sum += _push(self._short_buffer, value, self.short_window)
        self._long_sum += _push(self._long_buffer, value, self.long_window)
        if len(self._long_buffer) < self.long_window:
            return None
        short_mean = self._short_sum / (len(self._short_buffer) * _UNIT)
        long_mean = self._long_sum / (self.long_window * _UNIT)
        return self._judge(step, value, short_mean, long_mean)

    def _describe(self, short: float, long: float, gap: float) -> str:
        return (
            f"the mean {short:.4g} of its last {len(self._short_buffer)} values is {gap:.4g} away from the mean "
            f"{long:.4g} of its last {self.long_window}"
        )


def _push(buffer: deque[float], value: float, size: int) -> int:
    """Append ``value``, drop the oldest values beyond ``size``; return the exact change of the sum."""
    change = _in_units(value)
    buffer.append(value)
    while len(buffer) > size:
        change -= _in_units(buffer.popleft())
    return change
