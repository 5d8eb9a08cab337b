"""What goes wrong in reinforcement learning while the loss says nothing: the reward collapses, or the KL explodes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from hf_divguard.core.findings import Finding
from hf_divguard.core.state import Stateful, memory

__all__ = ["KlExplosion", "LogRule", "RewardCollapse"]

# The median of eight logs: a few lucky ones are no level that could be lost. Five standard deviations of a single
# log: healthy rewards are correlated from step to step, and swing further than independent ones would.
WINDOW = 8
DEVIATIONS = 5.0
LOST_SHARE = 0.5
CHANGES = 64
# A fall that the run came back from is no collapse when it comes again; one that is half as deep again may be.
SURVIVED = 1.5
# Penalty coefficients are set for a KL of some hundredths to some tenths of a nat for each token.
KL_FACTOR, KL_LEAST, KL_VALUES = 10.0, 1.0, 3


class LogRule(Stateful, ABC):
    """Base of the rules in this file: they get the values of a log key, one by one."""

    metric_key: str

    @abstractmethod
    def observe(self, step: int, value: float) -> Finding | None:
        """Feed one value; return a finding while something is wrong."""


@dataclass
class RewardCollapse(LogRule):
    """Warn when the reward has lost most of what it had gained, and more than its noise explains.

    The median of the last 8 values is compared with the best such median. It has collapsed when it
    is lower by more than 5 standard deviations of the noise, and by more than half of the
    gain since the start. The noise is taken from the changes between successive values. A fall
    that the run came back from is not reported again unless it is deeper.

    Args:
        metric_key: Log key of the reward, for messages.

    Example:
        >>> rule = RewardCollapse()
        >>> rewards = [0.5 + 0.01 * (step % 5) + 0.005 * step for step in range(60)] + [0.1] * 20
        >>> next(found.step for step, reward in enumerate(rewards) if (found := rule.observe(step, reward)))
        63
    """

    name: ClassVar[str] = "reward_collapse"

    metric_key: str = "reward"

    _last: deque[float] = memory(deque)
    _changes: deque[float] = memory(deque)
    _start: float | None = memory(None)
    _best: float | None = memory(None)
    _best_step: int = memory(0)
    _deepest: float = memory(0.0)
    _survived: float = memory(0.0)

    def observe(self, step: int, value: float) -> Finding | None:
        """Feed one value; return a finding while the reward has collapsed."""
        if not math.isfinite(value):
            return None
        if self._last:
            self._changes.append(value - self._last[-1])
        self._last.append(value)
        if len(self._last) < WINDOW:
            return None
        while len(self._last) > WINDOW:
            self._last.popleft()
        while len(self._changes) > CHANGES:
            self._changes.popleft()
        middle = median(self._last)
        if self._best is None or self._start is None:
            self._start = self._best = middle
            self._best_step = step
            return None
        if middle >= self._best:
            self._best, self._best_step = middle, step
            return None
        return self._judge(step, value, middle, self._best, self._best - self._start)

    def _judge(self, step: int, value: float, middle: float, best: float, gain: float) -> Finding | None:
        # The change between two values has twice the variance of one.
        noise = math.sqrt(sum(change * change for change in self._changes) / len(self._changes) / 2)
        limit = best - max(DEVIATIONS * noise, LOST_SHARE * gain)
        depth = best - middle
        if middle >= limit or depth <= SURVIVED * self._survived:
            self._survived, self._deepest = max(self._survived, self._deepest), 0.0
            return None
        # The median lags behind; on its way up again it is no collapse any more.
        if value >= limit:
            return None
        self._deepest = max(self._deepest, depth)
        return Finding(
            step=step,
            onset_step=min(self._best_step + 1, step),
            kind="drop",
            severity="warning",
            metric=self.metric_key,
            value=value,
            limit=limit,
            message=(
                f"`{self.metric_key}` has collapsed: the median of its last {WINDOW} values at step {step} is "
                f"{middle:.4g}, the best one was {best:.4g} at step {self._best_step} (limit {limit:.4g})."
            ),
            evidence={"median": middle, "best": best, "noise": noise},
        )


@dataclass
class KlExplosion(LogRule):
    """Warn when the KL to the reference model is far above everything before it.

    That is three values in a row above 10 times the highest value before them, and above 1 nat.

    Args:
        metric_key: Log key of the KL, for messages.

    Example:
        >>> rule = KlExplosion()
        >>> values = [0.01 * step for step in range(20)] + [40.0] * 3
        >>> [step for step, value in enumerate(values) if rule.observe(step, value)]
        [22]
    """

    name: ClassVar[str] = "kl_explosion"

    metric_key: str = "kl"

    _highest: float = memory(0.0)
    _count: int = memory(0)
    _row: int = memory(0)
    _onset: int = memory(0)

    def observe(self, step: int, value: float) -> Finding | None:
        """Feed one value; return a finding while the KL has exploded."""
        if not math.isfinite(value):
            return None
        limit = max(KL_FACTOR * self._highest, KL_LEAST)
        if self._count < WINDOW or value <= limit:
            self._count, self._row = self._count + 1, 0
            self._highest = max(self._highest, value)
            return None
        self._row += 1
        self._onset = step if self._row == 1 else self._onset
        if self._row < KL_VALUES:
            return None
        return Finding(
            step=step,
            onset_step=self._onset,
            kind="climb",
            severity="warning",
            metric=self.metric_key,
            value=value,
            limit=limit,
            message=(
                f"`{self.metric_key}` = {value:.4g} at step {step} is more than {KL_FACTOR:g} times all values before "
                f"step {self._onset} (limit {limit:.4g}): the model has moved far away from the reference model."
            ),
            evidence={"highest": self._highest},
        )
