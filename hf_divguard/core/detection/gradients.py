"""Gradient norms: their baseline, and the ratio of the last ones to it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from hf_divguard.core.detection.baseline import HUGE, PATIENCE
from hf_divguard.core.detection.sorted_window import SortedWindow, median
from hf_divguard.core.findings import Finding
from hf_divguard.core.state import Stateful, memory

__all__ = ["Gradients"]

# docs/detectors.md gives the source of each number.
LAST = 5
LEAST = 3
EXPLOSION = 100.0


@dataclass
class Gradients(Stateful):
    """The gradient norms of a run.

    Their ratio to the baseline separates a loss that is high and being pulled back (the
    ratio is high) from one that is high and stuck (it is not).

    Example:
        >>> gradients = Gradients()
        >>> for norm in (1.0, 1.2, 0.8, 1.0):
        ...     gradients.see(norm)
        ...     gradients.accept(norm, size=100)
        >>> for norm in (5.0, 6.0, 7.0):
        ...     gradients.see(norm)
        >>> gradients.pull()
        5.0
    """

    _baseline: SortedWindow = memory(SortedWindow)
    _last: deque[float] = memory(lambda: deque(maxlen=LAST))
    _seen: int = memory(0)
    _large_since: int | None = memory(None)
    _exploding: bool = memory(False)

    def __post_init__(self) -> None:
        # Not above any norm in the baseline.
        self._lowest = 0.0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory that ``state_dict`` returned."""
        super().load_state_dict(state_dict)
        self._lowest = 0.0

    def reset(self) -> None:
        """Forget everything that was observed."""
        super().reset()
        self._lowest = 0.0

    def see(self, norm: float) -> None:
        """Take a finite gradient norm."""
        self._last.append(norm if norm < HUGE else HUGE)
        self._seen += 1

    def accept(self, norm: float, size: int) -> None:
        """Let the gradient norm of a loss in the normal range into the baseline; keep ``size`` of them."""
        norm = norm if norm < HUGE else HUGE
        self._baseline.push_unsorted(norm, size)
        if norm < self._lowest:
            self._lowest = norm

    def pull(self, count: int = LAST) -> float | None:
        """Return the median of the last norms, ``count`` of 3 to 5, over the baseline; ``None`` if unknown."""
        baseline = self._baseline.quantile(0.5)
        if len(self._baseline) < LEAST or len(self._last) < LEAST or baseline <= 0.0:
            return None
        return median(list(self._last)[-min(LAST, count) :]) / baseline

    def is_large(self, norm: float) -> bool:
        """Return whether ``norm`` is 100 times the baseline."""
        if self._seen < 2 * PATIENCE or norm < EXPLOSION * self._lowest:
            return False
        ordered = self._baseline.ordered
        self._lowest = ordered[0] if ordered else 0.0
        return norm >= EXPLOSION * self._baseline.quantile(0.5)

    def forget_last(self) -> None:
        """Keep the baseline and drop the last norms: for after a rollback."""
        self._last.clear()
        self._large_since, self._exploding = None, False

    def judge(self, step: int) -> Finding | None:
        """Return a finding when the gradient norm begins to be 100 times the baseline."""
        last = self._last
        if not last or last[-1] < EXPLOSION * self._lowest or not self.is_large(last[-1]):
            # Whether the last few were large is checked again at the next large one.
            if (self._exploding or self._large_since is not None) and (self.pull() or 0.0) < EXPLOSION:
                self._exploding, self._large_since = False, None
            return None
        if self._large_since is None:
            self._large_since = step
        pull = self.pull()
        if pull is None or pull < EXPLOSION or self._exploding:
            return None
        self._exploding = True
        value, baseline = median(self._last), self._baseline.quantile(0.5)
        return Finding(
            step=step,
            onset_step=min(step, self._large_since),
            kind="grad_explosion",
            severity="warning",
            metric="grad_norm",
            value=value,
            limit=EXPLOSION * baseline,
            message=(
                f"`grad_norm` = {value:.4g} at step {step} (median of the last {len(self._last)}) is {pull:.3g} times "
                f"the baseline {baseline:.4g} (limit {EXPLOSION:g} times)."
            ),
            evidence={"baseline": baseline, "ratio": pull},
        )
