"""Micro-batches of the last steps: what the present weights were trained on since a state was kept."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from hf_divguard.hf.engines.tensors import bytes_of
from hf_divguard.hf.ranks import Ranks

__all__ = ["RecentBatches", "StepBatches"]

# All of the last few steps, and every few of those before.
_ALL_OF = 8
_EVERY = 5
_REACH = 80
# Memory that they may take, and how many there are even where that is more.
_LIMIT_BYTES = 128e6
_FEWEST = 4


@dataclass(frozen=True)
class StepBatches:
    """Micro-batches of a step.

    Args:
        step: The step that is trained on them.
        batches: The micro-batches, or some of them.
        num_items: Number of items in all micro-batches of the step.
        count: Number of micro-batches of the step.
    """

    step: int
    batches: list[Any]
    num_items: Any
    count: int

    def at_most(self, number: int) -> StepBatches:
        """Return the first ``number`` micro-batches."""
        return StepBatches(self.step, self.batches[:number], self.num_items, self.count)


class RecentBatches:
    """Keeps the first micro-batch of the last steps, where they are: on the device, if the loader put them there.

    Args:
        ranks: The processes of the run; all keep those of the same steps.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._kept: list[StepBatches] = []
        self._most: int | None = None

    def take(self, coming: StepBatches) -> None:
        """Keep the first micro-batch of a step."""
        if self._most is None:
            size = self._ranks.largest(bytes_of(coming.batches[0]))
            self._most = max(_FEWEST, int(_LIMIT_BYTES // max(1, size)))
        # Trainers take keys out of a batch.
        first = StepBatches(coming.step, [copy.copy(coming.batches[0])], coming.num_items, coming.count)
        older = [each for each in self._kept if self._stays(each.step, coming.step)]
        self._kept = [*older[-self._most + 1 :], first]

    def _stays(self, step: int, now: int) -> bool:
        return step > now - _ALL_OF or (step % _EVERY == 0 and step > now - _REACH)

    def all(self) -> list[StepBatches]:
        """Return those of the steps that were trained and of the coming one, which is the last."""
        return list(self._kept)

    def since(self, step: int, most: int) -> list[StepBatches]:
        """Return those of the steps after ``step`` that were trained, at most ``most``, evenly spread."""
        found = [each for each in self._kept[:-1] if each.step > step]
        if len(found) <= most:
            return found
        return [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]

    def newest(self, count: int, since: int) -> list[StepBatches]:
        """Return those of the newest steps after ``since``, the last one included."""
        return [each for each in self._kept if each.step > since][-count:]

    def until(self, step: int, count: int) -> list[StepBatches]:
        """Return those of the newest steps up to ``step``, which weights of that step were trained on."""
        return [each for each in self._kept[:-1] if each.step <= step][-count:]

    def forget(self) -> None:
        """Give the memory back."""
        self._kept = []
