"""Whether a run has recovered after a rollback."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hf_divguard.core.detection.baseline import EDGE, PATIENCE
from hf_divguard.core.detection.sorted_window import median
from hf_divguard.core.state import Stateful, memory

__all__ = ["RecoveryCheck"]

# Losses before the target that make the baseline. Enough for a quantile, and few enough that a falling curve
# has not fallen far over them.
_BASELINE_VALUES = 50
# Enough that the baseline of a target far back is still there.
_MEMORY = 400


@dataclass
class RecoveryCheck(Stateful):
    """Remember raw losses, and judge after a rollback whether they are back at their baseline.

    The limit is the 0.9 quantile of the last 50 losses up to the step that was restored. The
    run has recovered when the median of its last 9 losses is not above it; where there are
    fewer, when the least of them is not, since one or two may be high by chance. The median
    of nine values of the baseline lies above that quantile once in some thousand times.

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

    limit: float | None = memory(None)
    is_judging: bool = memory(False)
    since: int = memory(0)
    _losses: deque[tuple[int, float | None]] = memory(lambda: deque(maxlen=_MEMORY))

    def observe(self, step: int, loss: float) -> None:
        """Take the raw loss of a step; NaN and infinities count as bad."""
        self._losses.append((step, loss if math.isfinite(loss) else None))

    def rewind(self, target_step: int, step: int) -> None:
        """Begin to judge, after a rollback at ``step`` to ``target_step``.

        The losses in between are forgotten.
        """
        kept = [entry for entry in self._losses if entry[0] <= target_step]
        self._losses = deque(kept, maxlen=_MEMORY)
        self.limit = _upper([loss for _, loss in kept if loss is not None])
        self.is_judging = True
        self.since = step

    def level(self) -> float | None:
        """Return the median of the last losses since the rollback, of fewer than 9 the least.

        NaN if one is not finite, ``None`` if there is none.
        """
        late = self._since_rollback()[-PATIENCE:]
        if not late:
            return None
        finite = [loss for _, loss in late if loss is not None]
        if len(finite) < len(late):
            return math.nan
        return median(finite) if len(finite) == PATIENCE else min(finite)

    def has_recovered(self) -> bool:
        """Return whether the last losses are at or below the limit; without a limit, whether they are finite."""
        level = self.level()
        return level is None or not self._is_bad(level)

    def was_ever_bad(self) -> bool:
        """Return whether the median of 9 losses in a row was above the limit at any time since the rollback."""
        bad = [self._is_bad(loss) for _, loss in self._since_rollback()]
        return any(
            sum(bad[start : start + PATIENCE]) > PATIENCE // 2 for start in range(len(bad) - PATIENCE + 1)
        )

    def began_well(self) -> bool:
        """Return whether the first loss since the rollback, that of the restored weights, is below the limit."""
        return any(not self._is_bad(loss) for _, loss in self._since_rollback()[:1])

    def first_bad_step(self) -> int | None:
        """Return the first step since the rollback whose loss is above the limit."""
        return next((step for step, loss in self._since_rollback() if self._is_bad(loss)), None)

    def end(self) -> None:
        """Stop judging."""
        self.is_judging = False

    def _since_rollback(self) -> list[tuple[int, float | None]]:
        return [entry for entry in self._losses if entry[0] > self.since]

    def _is_bad(self, loss: float | None) -> bool:
        return loss is None or not loss <= (math.inf if self.limit is None else self.limit)


def _upper(losses: Sequence[float]) -> float | None:
    baseline = sorted(losses[-_BASELINE_VALUES:])
    if len(baseline) < PATIENCE:
        return None
    return baseline[min(len(baseline) - 1, int((1.0 - EDGE) * len(baseline)))]
