"""The kept states that present weights are compared with: few, thinned by age, within a memory limit."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from typing import Any

from hf_divguard.hf.engines.tensors import bytes_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.snapshots import Snapshots

__all__ = ["KeptStates"]

logger = logging.getLogger(__name__)

_EVERY = 5
_KEEP = 4
# One state stays that is so old: a fault shows in the loss within some steps.
_REACH = 60
# Copies may take so much of the training time. Shorter steps count as so long: there a fixed interval, which is the same
# in every run, is worth more than a hundredth of the time.
_SHARE = 0.01
_SHORTEST_STEP = 0.05


class KeptStates(Snapshots):
    """Copies of the last few states, for comparisons, and for rollbacks where the optimizer is kept too.

    Four states of ``w`` bytes of trained parameters and buffers and ``o`` bytes of optimizer
    state take ``4 (w + o)`` bytes of CPU memory, without the optimizer ``4 w``. Where that is
    more than the limit the optimizer is left out, and then everything.

    Args:
        ranks: The processes of the run.
        with_optimizer: Whether the optimizer is kept, so that a rollback needs no checkpoint.
        limit_bytes: Memory that all copies together may take.
        delay: Optimizer steps until a loss is seen.
    """

    def __init__(self, ranks: Ranks, *, with_optimizer: bool, limit_bytes: float, delay: int = 1) -> None:
        super().__init__(_EVERY, check_steps=1, margin_steps=0, with_optimizer=with_optimizer)
        self._ranks, self._limit_bytes = ranks, limit_bytes
        self._reach, self._delay = max(_REACH, 3 * delay), delay
        self._next, self._saved = 0, -1
        self._last_take: tuple[float, int] | None = None
        self._durations: deque[float] = deque(maxlen=3)
        self._is_too_large = False

    def is_due(self, step: int) -> bool:
        """Return whether the state of ``step`` is to be kept."""
        return (step >= self._next or step == self._saved) and not self._is_too_large

    def note_saved(self, step: int) -> None:
        """Have the state of a checkpoint kept, too: only states that were compared are gone back to."""
        self._saved = step

    def take(self, host: Host, step: int, callbacks: dict[str, Any]) -> None:
        """Copy the present state, if there is room for it."""
        if any(kept.step == step for kept in self._recent):
            return
        began = time.perf_counter()
        snapshot = self.copy_of_now(host, step, callbacks)
        # Parts of a sharded model differ in size; all ranks keep the same states.
        weights, optimizer = bytes_of(snapshot.tensors), bytes_of(snapshot.state.optimizer)
        if not self._fits(self._ranks.largest(weights + optimizer), self._ranks.largest(weights)):
            return
        self._recent.append(snapshot)
        self._make_room(_KEEP)
        if step >= self._next:  # the copy of a checkpoint moves no other
            self._next = step + self._interval(began, time.perf_counter() - began, step)

    def _fits(self, complete: int, weights: int) -> bool:
        if _KEEP * complete <= self._limit_bytes:
            return True
        self._is_too_large = _KEEP * weights > self._limit_bytes
        self._recent = [] if self.with_optimizer or self._is_too_large else self._recent
        self.with_optimizer = False
        if self._ranks.rank == 0:
            what = (
                "no weights are kept and compared" if self._is_too_large else "kept states hold no optimizer"
            )
            logger.warning(
                "%d states of %.3g GB are more than `divguard_compare_memory_gb` (%.3g): %s.",
                _KEEP,
                (weights if self._is_too_large else complete) / 1e9,
                self._limit_bytes / 1e9,
                what,
            )
        return False

    def _interval(self, began: float, seconds: float, step: int) -> int:
        """Return the steps until the next copy: more where copies take long."""
        last, self._last_take = self._last_take, (began, step)
        if last is None or step <= last[1]:
            return _EVERY
        # The least of the last few: a machine that is busy for a moment says nothing, and the first copy is slow.
        self._durations.append(seconds)
        if len(self._durations) == 1:
            return _EVERY
        seconds = min(self._durations)
        seconds_of_step = (began - last[0]) / (step - last[1])
        wanted = math.ceil(seconds / (_SHARE * max(seconds_of_step, _SHORTEST_STEP)))
        return max(_EVERY, *self._ranks.gather(wanted))
