"""An evaluation loss that has turned and climbs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hf_divguard.core.detection.baseline import HUGE
from hf_divguard.core.detection.sorted_window import median
from hf_divguard.core.findings import Finding, Severity
from hf_divguard.core.state import Stateful, memory

__all__ = ["EvalRise"]

# docs/detectors.md gives the source of each number.
KEPT = 24
IN_A_ROW = 3
SHARE = 0.1
SPREADS = 3.0


@dataclass
class EvalRise(Stateful):
    """Watch the loss of one evaluation set; report when its last 3 values all lie clearly above its best.

    Clearly means: by a tenth of what had been gained since the first evaluation, and by 3
    times the median distance of an evaluation from the mean of its neighbours.

    Example:
        >>> rise = EvalRise()
        >>> losses = [4.0, 3.3, 3.0, 2.9, 2.85, 2.9, 3.1, 3.3, 3.6]
        >>> findings = [rise.observe(step, loss) for step, loss in enumerate(losses)]
        >>> print(findings[-1])
        `eval_loss` = 3.6 at step 8 has climbed for 3 evaluations since its best 2.85 at step 4 (limit 3).
    """

    _first: float | None = memory(None)
    _best: float | None = memory(None)
    _best_step: int = memory(0)
    _values: deque[float] = memory(lambda: deque(maxlen=KEPT))
    _above: int = memory(0)
    _is_open: bool = memory(False)
    _training_at_best: float | None = memory(None)

    def observe(
        self,
        step: int,
        value: float,
        training_level: float | None = None,
        *,
        metric_key: str = "eval_loss",
        severity: Severity = "warning",
    ) -> Finding | None:
        """Feed one finite evaluation loss.

        Args:
            step: Optimizer step of the evaluation.
            value: The loss.
            training_level: Level of the training loss, where it is known.
            metric_key: Log key of the evaluation loss, for the message.
            severity: Severity of the finding.
        """
        value = max(-HUGE, min(HUGE, value))
        if self._first is None:
            self._first = value
        self._values.append(value)
        if self._best is None or value <= self._best:
            self._best, self._best_step, self._training_at_best = value, step, training_level
            self._above, self._is_open = 0, False
            return None
        limit = self._best + max(SHARE * (self._first - self._best), SPREADS * self._noise())
        self._above = self._above + 1 if value > limit else 0
        if self._above == 0:
            self._is_open = False
        if self._above < IN_A_ROW or self._is_open:
            return None
        self._is_open = True
        evidence: dict[str, float | int | str] = {"best": self._best, "best_step": self._best_step}
        while_falling = ""
        if training_level is not None and self._training_at_best is not None:
            evidence |= {"training_then": self._training_at_best, "training_now": training_level}
            if training_level < self._training_at_best:
                while_falling = (
                    f", while training fell from {self._training_at_best:.6g} to {training_level:.6g}"
                )
        return Finding(
            step=step,
            # The weights after the best step are good: so is the training loss of the step after it.
            onset_step=min(step, self._best_step + 2),
            kind="eval_climb",
            severity=severity,
            metric=metric_key,
            value=value,
            limit=limit,
            message=(
                f"`{metric_key}` = {value:.6g} at step {step} has climbed for {IN_A_ROW} evaluations since its "
                f"best {self._best:.6g} at step {self._best_step}{while_falling} (limit {limit:.4g})."
            ),
            evidence=evidence,
        )

    def _noise(self) -> float:
        values = self._values
        if len(values) < 3:
            return 0.0
        bends = [
            abs(values[i] - 0.5 * values[i - 1] - 0.5 * values[i + 1]) for i in range(1, len(values) - 1)
        ]
        return median(bends)
