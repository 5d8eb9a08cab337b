"""Two exponential moving averages: fires when the short one moves away from the long one."""

from __future__ import annotations

import math
import warnings
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from hf_divguard.core.detection.detector import check_setting, non_finite_finding
from hf_divguard.core.detection.gap import GapRule
from hf_divguard.core.findings import Finding
from hf_divguard.core.state import StateError, memory

__all__ = ["DualTimeScaleRule"]


@dataclass
class DualTimeScaleRule(GapRule):
    """Compare a fast and a slow exponential moving average of one series.

    Both averages start at the first finite value ``x`` and follow
    ``e = a * x + (1 - a) * e``. The rule fires on every value for which
    ``short_ema - long_ema >= threshold`` (with ``greater_is_better`` the other way
    round: ``long_ema - short_ema >= threshold``).

    After a lasting jump of height ``J`` the gap is ``J * (0.99**k - 0.9**k)`` after
    ``k`` values at the default alphas; it peaks at ``0.706 * J`` after 25 values, so the
    default threshold of 2.0 never sees a jump below 2.83.

    The memory is ``short_ema`` and ``long_ema``, ``None`` before the first value, and
    ``initialized``.

    Args:
        short_alpha: Weight of a new value in the fast average, in (0, 1]. Larger is faster.
        long_alpha: Weight of a new value in the slow average, in (0, 1].
        threshold: Smallest gap that fires, above 0, in the units of the metric. Larger is
            quieter.
        metric_key: Log key of the series, for messages.
        greater_is_better: Whether a *drop* of the metric is bad.

    Raises:
        ValueError: If an alpha is outside (0, 1], or ``threshold`` is not above 0 and finite.
        TypeError: If one of them is not a number.

    Example:
        >>> rule = DualTimeScaleRule(threshold=1.0)
        >>> findings = [rule.observe(step, 2.0 if step < 5 else 6.0) for step in range(9)]
        >>> [finding.step for finding in findings if finding]
        [8]
        >>> print(findings[8])
        `loss` = 6 at step 8 has risen: its short average 3.376 is 1.218 away from its long average 2.158 (limit 1).
    """

    name: ClassVar[str] = "ema"
    averages: ClassVar[tuple[str, str]] = ("short_ema", "long_ema")

    short_alpha: float = 0.1
    long_alpha: float = 0.01
    threshold: float = 2.0
    _: KW_ONLY
    metric_key: str = "loss"
    greater_is_better: bool = False

    short_ema: float | None = memory(None)
    long_ema: float | None = memory(None)
    initialized: bool = memory(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self.name, "short_alpha", self.short_alpha, above=0, at_most=1)
        check_setting(self.name, "long_alpha", self.long_alpha, above=0, at_most=1)
        if self.short_alpha <= self.long_alpha:
            warnings.warn(
                f"`short_alpha={self.short_alpha!r}` should be greater than `long_alpha={self.long_alpha!r}`: the "
                "short average has to react faster than the long one, otherwise a rise is never seen.",
                UserWarning,
                stacklevel=3,
            )

    def observe(self, step: int, value: float) -> Finding | None:
        """Feed one value; return a finding while the gap is at or above the threshold."""
        if not math.isfinite(value):
            return non_finite_finding(self.metric_key, step, value)
        if not self.initialized or self.short_ema is None or self.long_ema is None:
            self.short_ema = self.long_ema = value
            self.initialized = True
        else:
            self.short_ema = self.short_alpha * value + (1.0 - self.short_alpha) * self.short_ema
            self.long_ema = self.long_alpha * value + (1.0 - self.long_alpha) * self.long_ema
        return self._judge(step, value, self.short_ema, self.long_ema)

    def _describe(self, short: float, long: float, gap: float) -> str:
        return f"its short average {short:.4g} is {gap:.4g} away from its long average {long:.4g}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over both averages exactly as they are.

        Raises:
            StateError: If a part is missing or of another type, or an average is missing
                although ``initialized`` is true.
        """
        if isinstance(state_dict, dict) and state_dict.get("initialized") is True:
            averages = [state_dict.get("short_ema"), state_dict.get("long_ema")]
            if None in averages:
                raise StateError(f"`short_ema` and `long_ema` must be finite numbers, got {averages!r}.")
        super().load_state_dict(state_dict)
