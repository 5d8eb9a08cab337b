"""A loss of progress so large that a rollback is better than waiting for recovery."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from hf_divguard.core.detection.baseline import EDGE
from hf_divguard.core.detection.sorted_window import median
from hf_divguard.core.findings import Finding, rise_in_words
from hf_divguard.core.state import Stateful, memory

__all__ = ["SetbackCheck"]

# How long it has to last: a state from before it is some twenty steps old as well, with checkpoints that are
# saved that often, so that nothing is lost by restoring it. And a spike that recovers does so within fewer.
_VALUES = 20
# Values that may lie below the bar by chance.
_LOW_ALLOWED = 2
_BASELINE_VALUES = 50
_FIRST_VALUES = 5
_SHARE = 0.5
# Before the loss has fallen by this many widths of its noise there is nothing to lose.
_LEAST_PROGRESS = 4.0


@dataclass
class SetbackCheck(Stateful):
    """Report when half of the progress has been lost for 20 steps, even if the loss is recovering.

    A detector that stops a run should wait for a loss that recovers. With rollback, waiting
    costs more: the earlier state is better than the present one for as long as the loss is
    higher.

    The bar is half-way between the median of the 50 losses before the last 20 and that of
    the first 5 of the run. It has to be crossed by 18 of the last 20.

    Example:
        >>> check = SetbackCheck()
        >>> for step in range(1, 121):
        ...     finding = check.observe(step, 2.0 + 4.0 * 0.95**step if step <= 100 else 7.0 - 0.05 * (step - 100))
        >>> finding.kind, finding.onset_step
        ('setback', 101)
    """

    _first: list[float] = memory(list)
    _recent: deque[tuple[int, float]] = memory(lambda: deque(maxlen=_BASELINE_VALUES + _VALUES))

    def observe(self, step: int, loss: float) -> Finding | None:
        """Take the raw loss of a step; values that are not finite are ignored."""
        if not math.isfinite(loss):
            return None
        if len(self._first) < _FIRST_VALUES:
            self._first.append(loss)
        self._recent.append((step, loss))
        if len(self._recent) < _BASELINE_VALUES + _VALUES:
            return None
        entries = list(self._recent)
        baseline = sorted(value for _, value in entries[:_BASELINE_VALUES])
        late = entries[_BASELINE_VALUES:]
        center, upper = median(baseline), baseline[int((1.0 - EDGE) * _BASELINE_VALUES)]
        progress = median(self._first) - center
        bar = max(upper, center + _SHARE * progress)
        if progress < _LEAST_PROGRESS * (upper - center) or progress <= 0.0:
            return None
        if sum(value <= bar for _, value in late) > _LOW_ALLOWED:
            return None
        level = median(value for _, value in late)
        return Finding(
            step=step,
            onset_step=next(number for number, value in late if value > upper),
            kind="setback",
            severity="error",
            metric="loss",
            value=level,
            limit=bar,
            message=(
                f"`loss` has been above {bar:.4g} for {_VALUES} steps up to step {step} (median {level:.4g}, before "
                f"{center:.4g}): {rise_in_words(center, level, progress)}, even if it recovers."
            ),
        )

    def restart_baseline(self) -> None:
        """Make a baseline of what comes next: after a setback that cannot be undone."""
        self._recent.clear()

    def rewind(self, target_step: int) -> None:
        """Forget the losses after ``target_step``."""
        kept = [entry for entry in self._recent if entry[0] <= target_step]
        self._recent = deque(kept, maxlen=self._recent.maxlen)
