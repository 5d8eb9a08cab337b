"""Whether a run that went back is as good again as it was before the fault."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from hf_divguard.core.detection.baseline import median

__all__ = ["RecoveryCheck"]

# Losses before the target that say what was ordinary there. Enough for a quantile, and few enough that a
# falling curve has not fallen far over them.
_ORDINARY_VALUES = 50
# Fewer say nothing about their spread.
_FEWEST_VALUES = 9
# Losses at the end of a cool-down whose median is judged: odd, so that the median is one of them, and few, so
# that a fault which has just passed does not count.
_JUDGED_VALUES = 9
# The median of nine ordinary values lies above this quantile of the ordinary ones once in some thousand times.
_UPPER_QUANTILE = 0.9
# What is remembered: the ordinary values of a target that lies far back are still there.
_MEMORY = 400


class RecoveryCheck:
    """Remembers raw losses, and judges after a rollback whether they are back where they were.

    The limit is the 0.9 quantile of the last 50 losses up to the step that was gone back
    to. The run has recovered when the median of its last 9 losses is not above it; where
    there are fewer, when the least of them is not, since one or two may be high by chance.

    Example:
        >>> check = RecoveryCheck()
        >>> for step in range(1, 101):
        ...     check.observe(step, 2.0 + 0.01 * (step % 5))
        >>> check.rewind(target_step=90, step=100)
        >>> for step in range(101, 121):
        ...     check.observe(step, 2.0 if step > 110 else 9.0)
        >>> check.limit, check.level(), check.has_recovered()
        (2.04, 2.0, True)
    """

    def __init__(self) -> None:
        self.limit: float | None = None
        self.is_judging = False
        self._losses: deque[tuple[int, float]] = deque(maxlen=_MEMORY)
        self._since = 0

    def observe(self, step: int, loss: float) -> None:
        """Take the raw loss of a step; NaN and infinities count as bad."""
        self._losses.append((step, loss))

    def rewind(self, target_step: int, step: int) -> None:
        """Begin to judge, after a rollback at ``step`` to ``target_step``.

        The losses in between are forgotten.
        """
        kept = [entry for entry in self._losses if entry[0] <= target_step]
        self._losses = deque(kept, maxlen=_MEMORY)
        self.limit = _upper([loss for _, loss in kept])
        self.is_judging = True
        self._since = step

    def level(self) -> float | None:
        """Return the median of the last losses since the rollback, of fewer than 9 the least.

        NaN if one is not finite, ``None`` if there is none.
        """
        late = self._late()
        if not late:
            return None
        if not all(math.isfinite(loss) for loss in late):
            return math.nan
        return median(late) if len(late) == _JUDGED_VALUES else min(late)

    def has_recovered(self) -> bool:
        """Return whether the last losses are ordinary; with nothing to compare them with, whether they are finite."""
        level = self.level()
        return level is None or level <= (math.inf if self.limit is None else self.limit)

    def was_ever_bad(self) -> bool:
        """Return whether the median of 9 losses in a row was above the limit at any time since the rollback."""
        limit = math.inf if self.limit is None else self.limit
        is_bad = [not loss <= limit for step, loss in self._losses if step > self._since]
        half = _JUDGED_VALUES // 2
        return any(
            sum(is_bad[start : start + _JUDGED_VALUES]) > half
            for start in range(len(is_bad) - _JUDGED_VALUES + 1)
        )

    def began_well(self) -> bool:
        """Return whether the first loss since the rollback, that of the restored weights, is ordinary."""
        limit = math.inf if self.limit is None else self.limit
        return next((loss <= limit for step, loss in self._losses if step > self._since), False)

    def first_bad_step(self) -> int | None:
        """Return the first step since the rollback whose loss is above the limit."""
        limit = math.inf if self.limit is None else self.limit
        return next((step for step, loss in self._losses if step > self._since and not loss <= limit), None)

    def end(self) -> None:
        """Stop judging."""
        self.is_judging = False

    def _late(self) -> list[float]:
        return [loss for step, loss in self._losses if step > self._since][-_JUDGED_VALUES:]

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON values; a loss that is not finite is ``None``."""
        losses = [[step, loss if math.isfinite(loss) else None] for step, loss in self._losses]
        return {"is_judging": self.is_judging, "limit": self.limit, "since": self._since, "losses": losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            limit, since = state_dict["limit"], int(state_dict["since"])
            losses = [
                (int(step), math.nan if loss is None else float(loss)) for step, loss in state_dict["losses"]
            ]
            self.is_judging = bool(state_dict["is_judging"])
            self.limit = None if limit is None else float(limit)
        except (KeyError, TypeError) as error:
            raise ValueError(f"The memory of losses cannot be read: {error!r}.") from error
        self._since, self._losses = since, deque(losses, maxlen=_MEMORY)


def _upper(losses: Sequence[float]) -> float | None:
    ordinary = sorted(loss for loss in losses[-_ORDINARY_VALUES:] if math.isfinite(loss))
    if len(ordinary) < _FEWEST_VALUES:
        return None
    return ordinary[min(len(ordinary) - 1, int(_UPPER_QUANTILE * len(ordinary)))]
