"""A fall so deep that going back is better than waiting until it heals."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from hf_divguard.core.detection.baseline import median
from hf_divguard.core.findings import Finding

__all__ = ["SETBACK", "SetbackCheck"]

SETBACK = "setback"
"""Kind of the finding that half of what was learnt is lost, whether it heals or not."""

# How long it has to last: a state from before it is some twenty steps behind as well, with checkpoints that are
# saved that often, so that nothing is lost by going there. And a spike that heals does so within fewer.
_VALUES = 20
# Values that may lie below the bar by chance.
_LOW_ALLOWED = 2
_ORDINARY_VALUES = 50
_FIRST_VALUES = 5
_SHARE = 0.5
# Before the loss has fallen by this many widths of its noise there is nothing to lose.
_LEAST_PROGRESS = 4.0


class SetbackCheck:
    """Report when half of what was learnt has been lost for 20 steps, even if it is on the way back.

    A detector that stops a run does well to wait for what heals. For one that rolls back
    waiting is the dearer choice: the state from before is better than the present one for
    as long as the loss is higher.

    The bar is half-way between the median of the 50 losses before the last 20 and that of
    the first 5 of the run. It has to be crossed by 18 of the last 20.

    Example:
        >>> check = SetbackCheck()
        >>> for step in range(1, 121):
        ...     finding = check.observe(step, 2.0 + 4.0 * 0.95**step if step <= 100 else 7.0 - 0.05 * (step - 100))
        >>> finding.kind, finding.onset_step
        ('setback', 101)
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=_ORDINARY_VALUES + _VALUES)

    def observe(self, step: int, loss: float) -> Finding | None:
        """Take the raw loss of a step; what is not finite is not this check's business."""
        if not math.isfinite(loss):
            return None
        if len(self._first) < _FIRST_VALUES:
            self._first.append(loss)
        self._recent.append((step, loss))
        if len(self._recent) < _ORDINARY_VALUES + _VALUES:
            return None
        entries = list(self._recent)
        ordinary = sorted(value for _, value in entries[:_ORDINARY_VALUES])
        late = entries[_ORDINARY_VALUES:]
        center, upper = median(ordinary), ordinary[int(0.9 * _ORDINARY_VALUES)]
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
            kind=SETBACK,
            severity="error",
            metric="loss",
            value=level,
            limit=bar,
            message=(
                f"`loss` has been above {bar:.4g} for {_VALUES} steps up to step {step} (median {level:.4g}, before "
                f"{center:.4g}). That is a rise by {(level - center) / progress:.0%} of the progress since the start, "
                "even if it heals."
            ),
        )

    def begin_anew(self) -> None:
        """Take what comes for ordinary: after a setback that cannot be undone."""
        self._recent.clear()

    def rewind(self, target_step: int) -> None:
        """Forget the losses after ``target_step``."""
        kept = [entry for entry in self._recent if entry[0] <= target_step]
        self._recent = deque(kept, maxlen=self._recent.maxlen)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON values."""
        return {"first": list(self._first), "recent": [list(entry) for entry in self._recent]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            first = [float(value) for value in state_dict["first"]]
            recent = [(int(step), float(value)) for step, value in state_dict["recent"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The memory of setbacks cannot be read: {error!r}.") from error
        self._first, self._recent = first[:_FIRST_VALUES], deque(recent, maxlen=self._recent.maxlen)
