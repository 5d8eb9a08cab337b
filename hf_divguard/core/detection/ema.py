"""Two exponential moving averages: fires when the short one runs away from the long one."""

from __future__ import annotations

import math
import warnings
from typing import Any

from hf_divguard.core.detection.detector import non_finite_finding
from hf_divguard.core.findings import Finding

__all__ = ["DualTimeScaleRule"]


class DualTimeScaleRule:
    """Compare a fast and a slow exponential moving average of one series.

    Both averages start at the first finite value ``x`` and follow
    ``e = a * x + (1 - a) * e``. The rule fires on every value for which
    ``short_ema - long_ema >= threshold`` (with ``greater_is_better`` the other way
    round: ``long_ema - short_ema >= threshold``).

    After a lasting jump of height ``J`` the gap is ``J * (0.99**k - 0.9**k)`` after
    ``k`` values at the default alphas; it peaks at ``0.706 * J`` after 25 values, so the
    default threshold of 2.0 never sees a jump below 2.83.

    Args:
        short_alpha: Weight of a new value in the fast average, in (0, 1]. Larger is faster.
        long_alpha: Weight of a new value in the slow average, in (0, 1].
        threshold: Smallest gap that fires, in the units of the metric. Larger is quieter.
        metric: Log key of the series, for messages.
        greater_is_better: Whether a *drop* of the metric is the trouble.

    Raises:
        ValueError: If an alpha is outside (0, 1] or ``threshold`` is not a finite number.

    Example:
        >>> rule = DualTimeScaleRule(threshold=1.0)
        >>> findings = [rule.observe(step, 2.0 if step < 5 else 6.0) for step in range(9)]
        >>> [finding.step for finding in findings if finding]
        [8]
        >>> print(findings[8])
        `loss` = 6 at step 8 has risen: its short average 3.376 is 1.218 away from its long average 2.158 (limit 1).
    """

    def __init__(
        self,
        short_alpha: float = 0.1,
        long_alpha: float = 0.01,
        threshold: float = 2.0,
        *,
        metric: str = "loss",
        greater_is_better: bool = False,
    ) -> None:
        for name, alpha in (("short_alpha", short_alpha), ("long_alpha", long_alpha)):
            if not 0.0 < alpha <= 1.0:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {alpha!r}.")
        if not math.isfinite(threshold):
            raise ValueError(f"`threshold` must be a finite number, got {threshold!r}.")
        if short_alpha <= long_alpha:
            warnings.warn(
                f"`short_alpha={short_alpha!r}` should be greater than `long_alpha={long_alpha!r}`: the short "
                "average has to react faster than the long one, otherwise a rise is never seen.",
                UserWarning,
                stacklevel=2,
            )
        self.short_alpha = short_alpha
        self.long_alpha = long_alpha
        self.threshold = threshold
        self.metric = metric
        self.greater_is_better = greater_is_better
        self.reset()

    def reset(self) -> None:
        """Forget everything that was observed."""
        self.short_ema: float | None = None
        self.long_ema: float | None = None
        self.initialized = False

    def observe(self, step: int, value: float) -> Finding | None:
        """Feed one value; return a finding while the gap is at or above the threshold."""
        if not math.isfinite(value):
            return non_finite_finding(self.metric, step, value)
        if self.short_ema is None or self.long_ema is None:
            self.short_ema = self.long_ema = value
            self.initialized = True
        else:
            self.short_ema = self.short_alpha * value + (1.0 - self.short_alpha) * self.short_ema
            self.long_ema = self.long_alpha * value + (1.0 - self.long_alpha) * self.long_ema
        gap = self.long_ema - self.short_ema if self.greater_is_better else self.short_ema - self.long_ema
        if gap < self.threshold:
            return None
        return self._finding(step, value, gap)

    def _finding(self, step: int, value: float, gap: float) -> Finding:
        assert self.short_ema is not None
        assert self.long_ema is not None
        moved, sign = ("fallen", -1.0) if self.greater_is_better else ("risen", 1.0)
        return Finding(
            step=step,
            onset_step=step,
            kind="drop" if self.greater_is_better else "jump",
            severity="error",
            metric=self.metric,
            value=value,
            limit=self.long_ema + sign * self.threshold,
            message=(
                f"`{self.metric}` = {value:.4g} at step {step} has {moved}: its short average "
                f"{self.short_ema:.4g} is {gap:.4g} away from its long average {self.long_ema:.4g} "
                f"(limit {self.threshold:.4g})."
            ),
            evidence={"short_ema": self.short_ema, "long_ema": self.long_ema, "gap": gap},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return ``short_ema``, ``long_ema`` and ``initialized``."""
        return {"short_ema": self.short_ema, "long_ema": self.long_ema, "initialized": self.initialized}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over both averages.

        Raises:
            ValueError: If a key is missing, or an average is not a finite number although
                ``initialized`` says there is one.
        """
        missing = {"short_ema", "long_ema", "initialized"} - state_dict.keys()
        if missing:
            raise ValueError(
                f"The state of the two averages lacks {sorted(missing)}; it holds {sorted(state_dict)}."
            )
        if not state_dict["initialized"]:
            self.reset()
            return
        averages = [state_dict["short_ema"], state_dict["long_ema"]]
        if not all(isinstance(e, (int, float)) and math.isfinite(e) for e in averages):
            raise ValueError(f"Both averages must be finite numbers, got {averages!r}.")
        self.short_ema, self.long_ema = (float(e) for e in averages)
        self.initialized = True
