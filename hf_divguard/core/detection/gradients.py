"""Gradient norms: the usual one, and how far the last ones are from it."""

from __future__ import annotations

from collections import deque
from typing import Any

from hf_divguard.core.detection.baseline import SortedWindow, median
from hf_divguard.core.findings import Finding

__all__ = ["GRAD_EXPLOSION", "Gradients"]

GRAD_EXPLOSION = "grad_explosion"
"""Kind of the finding that the gradient norm is 100 times the usual."""

# Where each number comes from is told in docs/detectors.md.
LAST = 5
LEAST = 3
EXPLOSION = 100.0
SEEN_BEFORE = 18
_HUGE = 1e300


class Gradients:
    """The gradient norms of a run.

    Their ratio to the usual one tells a loss that is high and being pulled back (the ratio
    is high) from one that is high and stuck (it is not).

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

    def __init__(self) -> None:
        self._usual = SortedWindow()
        self._last: deque[float] = deque(maxlen=LAST)
        self._seen = 0
        self._large_since: int | None = None
        self._exploding = False

    def see(self, norm: float) -> None:
        """Take a finite gradient norm, usual or not."""
        self._last.append(min(norm, _HUGE))
        self._seen += 1

    def accept(self, norm: float, size: int) -> None:
        """Let the gradient norm of an ordinary loss into what is usual; keep ``size`` of them."""
        self._usual.append(min(norm, _HUGE), size)

    def pull(self, count: int = LAST) -> float | None:
        """Return the median of the last norms, ``count`` of 3 to 5, over the usual one; ``None`` if unknown."""
        usual = self._usual.quantile(0.5)
        if len(self._usual) < LEAST or len(self._last) < LEAST or usual <= 0.0:
            return None
        return median(list(self._last)[-max(LEAST, min(LAST, count)) :]) / usual

    def is_large(self, norm: float) -> bool:
        """Return whether ``norm`` is 100 times the usual."""
        return self._seen >= SEEN_BEFORE and norm >= EXPLOSION * self._usual.quantile(0.5)

    def forget_last(self) -> None:
        """Keep what is usual and drop the last norms: for after a rollback."""
        self._last.clear()
        self._large_since, self._exploding = None, False

    def judge(self, step: int) -> Finding | None:
        """Return a finding when the gradient norm begins to be 100 times the usual."""
        if not self._last or not self.is_large(self._last[-1]):
            # Not this one; whether the last few were is asked again with the next large one.
            if (self.pull() or 0.0) < EXPLOSION:
                self._exploding, self._large_since = False, None
            return None
        if self._large_since is None:
            self._large_since = step
        pull = self.pull()
        if pull is None or pull < EXPLOSION or self._exploding:
            return None
        self._exploding = True
        value, usual = median(self._last), self._usual.quantile(0.5)
        return Finding(
            step=step,
            onset_step=min(step, self._large_since),
            kind=GRAD_EXPLOSION,
            severity="warning",
            metric="grad_norm",
            value=value,
            limit=EXPLOSION * usual,
            message=(
                f"`grad_norm` = {value:.4g} at step {step} (median of the last {len(self._last)}) is {pull:.3g} times "
                f"the usual {usual:.4g} (limit {EXPLOSION:g} times)."
            ),
            evidence={"usual": usual, "ratio": pull},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as JSON values."""
        return {
            "usual": self._usual.values(),
            "last": list(self._last),
            "seen": self._seen,
            "large_since": self._large_since,
            "exploding": self._exploding,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory.

        Raises:
            KeyError: If a part is missing.
            TypeError: If a part is not made of numbers.
        """
        usual = SortedWindow([float(norm) for norm in state_dict["usual"]])
        last = deque([float(norm) for norm in state_dict["last"]], maxlen=LAST)
        large_since = state_dict["large_since"]
        self._seen, self._exploding = int(state_dict["seen"]), bool(state_dict["exploding"])
        self._large_since = None if large_since is None else int(large_since)
        self._usual, self._last = usual, last
