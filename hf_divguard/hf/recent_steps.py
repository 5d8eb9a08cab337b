"""The last steps of a run: loss, gradient norm and learning rate of each, and, if asked, the text of its rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_divguard.core.detection.detector import StepValues

__all__ = ["RecentSteps", "StepRecord"]

_STEPS = 512
# Of a row so many tokens are kept, and of a step so many rows.
_TOKENS, _ROWS = 512, 64


@dataclass(frozen=True)
class StepRecord:
    """One step.

    Args:
        step: The step.
        loss: Its loss; may be NaN or infinite.
        grad_norm: Norm of its gradients before clipping; ``None`` where it is not known.
        learning_rate: Learning rate of its update; ``None`` where it is not known.
    """

    step: int
    loss: float
    grad_norm: float | None
    learning_rate: float | None


class RecentSteps:
    """Keeps the last 512 steps.

    Args:
        keeps_rows: Number of steps whose token ids are kept, to be decoded; 0 for none.
    """

    def __init__(self, keeps_rows: int = 0) -> None:
        self.is_on = False
        """Whether the losses are delivered here."""
        self.records: deque[StepRecord] = deque(maxlen=_STEPS)
        self._rates: dict[int, float] = {}
        self._keeps_rows = keeps_rows
        self._rows: dict[int, list[torch.Tensor]] = {}

    def note_rate(self, step: int, rate: Any) -> None:
        """Note the learning rate of the update that is made now."""
        # A rate on the device would have to be waited for.
        if self.is_on and isinstance(rate, (int, float)):
            self._rates[step] = float(rate)

    def note_batches(self, step: int, batches: Sequence[Any]) -> None:
        """Note the rows of a step, where they are to be kept."""
        if not (self.is_on and self._keeps_rows):
            return
        tokens = [batch.get("input_ids") if isinstance(batch, Mapping) else None for batch in batches]
        self._rows[step] = [each for each in tokens if isinstance(each, torch.Tensor) and each.dim() == 2]
        for old in [each for each in self._rows if each <= step - self._keeps_rows]:
            del self._rows[old]

    def rows_of(self, step: int) -> list[list[list[int]]]:
        """Return the token ids of a step by micro-batch and row, as far as they are kept."""
        kept = self._rows.get(step, [])
        return [batch[:_ROWS, :_TOKENS].tolist() for batch in kept]

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        """Take what the steps since the last delivery showed."""
        for entry in values:
            rate = self._rates.pop(entry.step, None)
            self.records.append(StepRecord(entry.step, entry.loss, entry.grad_norm, rate))
        if values:
            self._rates = {step: rate for step, rate in self._rates.items() if step > values[-1].step}
