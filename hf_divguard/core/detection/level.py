"""The level of a loss: whether it jumped, climbs or is stuck, measured against the run itself."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from hf_divguard.core.detection.baseline import RobustBaseline, median
from hf_divguard.core.detection.cusum import DRIFT, PATIENCE, PULL, RECOVERY, RiseCusum
from hf_divguard.core.detection.gradients import Gradients
from hf_divguard.core.findings import Finding, Kind, rise_in_words
from hf_divguard.core.state import Stateful, memory

__all__ = ["LossLevelMonitor"]

# docs/detectors.md gives the source of each number.
FIRST_VALUES = 5
LEAST_PATIENCE = 3
HISTORY_PER_PATIENCE = 10
JUMP_SCORE = 8.0
CLIMB_SCORE = 30.0
JUMP_SHARE = 0.25
CLIMB_SHARE = 0.4
FULL_SHARE = 0.4
JUMP_SPREADS = 3.0
CLIMB_SPREADS = 10.0
LEAST_SPREADS = 0.3
FEW_VALUES = 50
JUMP_MOVEMENTS = 2.0
CLIMB_MOVEMENTS = 5.0
CLIMB_NOISES = 3.0
RECOVERED_FACTOR = 1.5
SLOW_RISE = 20
RETURNED = 25
SPIKE_SPREADS = 5.0
PLATEAU_VALUES = 16
PLATEAU_RATIO = 8
PLATEAU_NOISES = 4.0
RESOLUTION = 1e-2
SURGE = 10.0
_HUGE = 1e300


class _Bounds(NamedTuple):
    """What a rise has to reach at this value to matter."""

    progress: float
    jump: float
    climb: float
    jump_scale: float
    climb_scale: float
    weight: float
    unlearnt: float


@dataclass
class LossLevelMonitor(Stateful):
    """Find rises of one series that last, among noise, spikes and rises that recover.

    Args:
        sensitivity: How readily findings are made. 2.0 asks for half the height and half
            the evidence of 1.0.
        metric_key: Log key of the series, for messages.

    Example:
        >>> watch = LossLevelMonitor()
        >>> kinds = []
        >>> for step in range(80):
        ...     finding = watch.observe(step, 1.0 if step < 50 else 3.0, None)
        ...     kinds += [(step, finding.kind)] if finding else []
        >>> kinds
        [(50, 'spike'), (58, 'jump')]
    """

    sensitivity: float = 1.0
    metric_key: str = "loss"

    gradients: Gradients = memory(Gradients)
    level: RobustBaseline = memory(RobustBaseline)
    grace: int = memory(0)
    _recovered: float = memory(0.0)
    _calm_step: int | None = memory(None)
    _lowest_step: int | None = memory(None)
    _jump: RiseCusum = memory(RiseCusum)
    _climb: RiseCusum = memory(RiseCusum)
    _step: int | None = memory(None)
    _gap: int = memory(1)
    _topped: float = memory(0.0)
    _surge_score: float = memory(0.0)
    _surge: deque[float] = memory(lambda: deque(maxlen=PATIENCE))
    _is_open: bool = memory(False)

    def start_grace(self, values: int) -> None:
        """Keep the baseline, drop what is suspected, and judge no rise for ``values`` values."""
        self.grace = values
        self._jump, self._climb = RiseCusum(), RiseCusum()
        self._step, self._gap, self._is_open = None, 1, False
        self._surge.clear()
        self._surge_score = 0.0

    @property
    def is_suspecting(self) -> bool:
        """Whether values are being kept out of the level, so that it is not where the loss is."""
        return self._is_open or self._jump.score > 0.0

    @property
    def suspected_since(self) -> int | None:
        """Step since which a rise is suspected; ``None`` while there is little to suspect."""
        return self._jump.onset_step if self._jump.score > 0.5 * JUMP_SCORE else None

    def observe(self, step: int, value: float, gradient: float | None) -> Finding | None:
        """Feed one finite value with its finite gradient norm, if known; return a finding if there is one."""
        if self._step is not None and step > self._step:
            self._gap = step - self._step
        self._step = step
        level = self.level
        level.see(value)
        if level.count in (level.lowest[0][1], level.lowest[-1][1]):
            self._lowest_step = step
        if level.count <= FIRST_VALUES:
            self._accept(step, value, gradient, math.inf)
            return None
        if self.grace > 0:
            self.grace -= 1
            if value <= level.upper:
                self._accept(step, value, gradient, math.inf)
            return None
        bounds = self._bounds(value)
        center, best = level.center, _or_center(level.best, level.center)
        kind: Kind | None = self._judge_jump(step, value, bounds, center)
        kind = kind or self._judge_climb(step, value, bounds, best)
        kind = kind or self._judge_plateau()
        note = self._spike(step, value, bounds) if len(self._jump.values) == 1 else None
        finding = self._level_finding(kind, step, value, bounds) if kind and not self._is_open else note
        self._is_open = self._is_open or kind is not None
        if self._jump.score == 0.0:
            if self._climb.score == 0.0 and not kind:
                self._is_open = False
            self._recovered *= 0.5 ** (1.0 / self.level.count)
            self._topped *= 0.5 ** (1.0 / self.level.count)
            self._accept(step, value, gradient, best + 0.25 * bounds.climb)
        return finding

    def _bounds(self, value: float) -> _Bounds:
        """Return what matters now: shares of the progress, spreads of the noise, rises that recovered."""
        level, progress, spread = self.level, self.level.progress, self.level.spread
        few = max(1.0, FEW_VALUES / level.count)
        size = abs(level.center)
        # Before anything certain is learnt there is nothing to lose: only the size of the loss measures a rise.
        share = 1.0 / (1.0 + min(1e6, progress / spread) ** 2) if spread > 0.0 else 0.0 if progress else 1.0
        unlearnt = share * size
        least = max(RESOLUTION * size, JUMP_MOVEMENTS * level.movement)
        jump = max(least, JUMP_SHARE * progress, FULL_SHARE * unlearnt, _spreads(JUMP_SPREADS * few, progress, spread))
        climb = max(CLIMB_SHARE * progress, CLIMB_MOVEMENTS * level.movement_at_best, RESOLUTION * size)
        if share > 0.5:
            climb = max(climb, SURGE * abs(_or_center(level.best, level.center)))
        climb = max(climb, _spreads(CLIMB_SPREADS * few, progress, level.spread_at_best))
        # A rise like one that recovered may recover too; losing all that was learnt is always reported.
        recovered = min(RECOVERED_FACTOR * self._recovered, progress)
        jump, climb = max(jump, recovered) / self.sensitivity, max(climb, recovered) / self.sensitivity
        scale = max(FULL_SHARE * progress, spread / 2.563)
        if scale <= 0.0:
            # A constant so far: its scale is known from its size alone.
            scale = max(RESOLUTION * abs(level.center), 1e-300)
        jump, climb = jump or scale, climb or scale
        patience = max(
            LEAST_PATIENCE, -(-PATIENCE // self._gap), min(PATIENCE, level.count / HISTORY_PER_PATIENCE)
        )
        return _Bounds(
            progress, jump, climb, scale, max(0.1 * progress, 2.0 * level.noise) or scale, PATIENCE / patience, share
        )

    def _judge_jump(self, step: int, value: float, bounds: _Bounds, center: float) -> Kind | None:
        rise, weight = self._jump, bounds.weight
        was_rising = rise.score > 0.0
        rise.add(step, value, (value - self.level.upper) / bounds.jump_scale, weight)
        if self._is_surge(value, center, bounds):
            return "jump"
        if self.level.is_policy_like:
            if not self._surge:
                self._take_back()
            return None
        if rise.score == 0.0:
            if was_rising:
                self._take_back()
            return None
        height, count = rise.late_level() - center, len(rise.values) * weight
        if count >= 6.0:
            rise.peak = max(rise.peak, min(height, _HUGE))
        if rise.score >= JUMP_SCORE / self.sensitivity:
            if (
                not self._is_open
                and rise.late_level(0.25) - center >= bounds.jump
                and not self._is_recovering(rise, center, bounds.jump, bounds)
            ):
                return "jump"
            rise.score = min(rise.score, 2.0 * JUMP_SCORE / self.sensitivity)
        if count > SLOW_RISE and (rise.peak < bounds.jump or height < 0.5 * bounds.jump):
            # Over, or too slow or too small: part of the baseline now; a climb is measured from the best level.
            self._take_back()
        return None

    def _is_surge(self, value: float, center: float, bounds: _Bounds) -> bool:
        """Return whether the last values in a row lie so far above all before that few of them are enough."""
        reach = max(self.level.reach, abs(center), self._topped, 1e-300)
        reach *= SURGE if bounds.unlearnt > 0.5 else 1.0
        size = (value - center) / reach
        if size <= 1.0:
            if self._surge:
                self._topped = max(self._topped, max(self._surge) - center)
            self._surge.clear()
            self._surge_score = 0.0
            return False
        pull = self.gradients.pull(1)
        is_pulled = pull is not None and pull > PULL
        self._surge.append(value)
        patience = max(LEAST_PATIENCE, min(PATIENCE, self.level.count / 3))
        self._surge_score += max(PATIENCE / patience, 1.0 + (1.0 if is_pulled else 3.3) * math.log10(size)) - DRIFT
        if self._is_open or self._surge_score < JUMP_SCORE / self.sensitivity:
            return False
        if len(self._surge) < 2 and size < SURGE**3:
            return False
        if value <= RECOVERY * self._surge[0]:
            return False
        return size >= SURGE or not self._is_recovering(self._jump, center, bounds.jump, bounds)

    def _judge_climb(self, step: int, value: float, bounds: _Bounds, best: float) -> Kind | None:
        climb = self._climb
        climb.add(step, value, (value - best - bounds.climb) / bounds.climb_scale, bounds.weight)
        if climb.score < CLIMB_SCORE / self.sensitivity or self._is_open or self.level.is_policy_like:
            return None
        if median(climb.values[-PATIENCE:]) - best < max(bounds.climb, CLIMB_NOISES * self.level.noise):
            return None
        return None if self._is_recovering(climb, best, bounds.climb, bounds) else "climb"

    def _judge_plateau(self) -> Kind | None:
        level = self.level
        (lowest, first), (second, other) = level.lowest
        if level.count < max(PLATEAU_VALUES, PLATEAU_RATIO * max(first, other)):
            return None
        noise = PLATEAU_NOISES * max(level.noise, level.early_noise)
        gained, lost, gap = level.initial - lowest, level.center - lowest, level.lower - second
        far = (
            gained > max(noise, JUMP_SHARE * abs(level.initial))
            and lost > PLATEAU_NOISES * level.early_noise
            and gap > PLATEAU_NOISES * level.noise
        )
        return "plateau" if far and gap > 0.0 and lost >= JUMP_SHARE / self.sensitivity * gained else None

    def _is_recovering(self, rise: RiseCusum, base: float, need: float, bounds: _Bounds) -> bool:
        return rise.is_recovering(
            base, need, bounds.progress, self.gradients.pull(max(3, len(rise.values))), bounds.weight
        )

    def _take_back(self) -> None:
        """Let the values of a rise that is over into the baseline, so that the next such rise is in range."""
        rise = self._jump
        if rise.values:
            self._topped = max(self._topped, max(rise.values) - self.level.center)
        if len(rise.values) >= PATIENCE or rise.highest_score >= 0.5 * JUMP_SCORE:
            self._recovered = max(self._recovered, rise.peak)
        for value in rise.values[-RETURNED:]:
            self.level.accept(value)
        rise.clear()

    def _accept(self, step: int, value: float, gradient: float | None, calm: float) -> None:
        self.level.accept(value)
        if gradient is not None:
            self.gradients.accept(gradient, self.level.size)
        if self.level.level is not None and self.level.level <= calm:
            self._calm_step = step

    # ---- findings

    def _spike(self, step: int, value: float, bounds: _Bounds) -> Finding | None:
        limit = self.level.upper + max(bounds.jump, SPIKE_SPREADS * self.level.spread)
        if value < limit or self._is_open:
            return None
        message = (
            f"`{self.metric_key}` = {value:.4g} at step {step} is a spike: above {limit:.4g}, while the baseline is "
            f"{self.level.center:.4g}."
        )
        return Finding(
            step=step,
            onset_step=step,
            kind="spike",
            severity="note",
            metric=self.metric_key,
            value=value,
            limit=limit,
            message=message,
            evidence={"baseline": self.level.center, "spread": self.level.spread},
        )

    def _level_finding(self, kind: Kind, step: int, value: float, bounds: _Bounds) -> Finding:
        level, best = self.level, _or_center(self.level.best, self.level.center)
        if kind == "jump":
            before, now, limit = level.center, self._jump.late_level(), level.center + bounds.jump
            onset = step if self._jump.onset_step is None else min(step, self._jump.onset_step)
            said = f"has stayed up since it jumped at step {onset}: {before:.4g} before, {now:.4g} now"
        elif kind == "climb":
            before, now, limit = best, median(self._climb.values[-PATIENCE:]), best + bounds.climb
            onset = _after(self._calm_step, step)
            said = f"has climbed from step {onset} on: {before:.4g} at its best, {now:.4g} now"
        else:
            before, now, limit = level.lowest[0][0], level.center, level.lowest[1][0]
            onset = _after(self._lowest_step, step)
            said = f"has been stuck from step {onset} on: {before:.4g} at its best, {now:.4g} now"
        evidence: dict[str, float | int | str] = {
            "before": before,
            "now": now,
            "best": best,
            "progress": bounds.progress,
            "noise": level.noise,
        }
        if bounds.progress > 0.0:
            evidence["lost_share"] = (now - before) / bounds.progress
        lost = rise_in_words(before, now, bounds.progress)
        lost = f", {lost}" if lost else ""
        pull = self.gradients.pull()
        if pull is not None:
            evidence["grad_norm_ratio"] = pull
        return Finding(
            step=step,
            onset_step=onset,
            kind=kind,
            severity="error",
            metric=self.metric_key,
            value=value,
            limit=limit,
            message=f"`{self.metric_key}` = {value:.4g} at step {step} {said} (limit {limit:.4g}){lost}.",
            evidence=evidence,
        )


def _or_center(best: float | None, center: float) -> float:
    """Return ``best``, or ``center`` while there is none."""
    return center if best is None else best


def _after(last_good: int | None, step: int) -> int:
    """Return the first step that may be bad, at most ``step``."""
    return step if last_good is None else min(step, last_good + 1)


def _spreads(factor: float, progress: float, spread: float) -> float:
    """Return how high a rise must be in spreads: the larger the progress, the fewer spreads."""
    if spread <= 0.0:
        return 0.0
    return max(LEAST_SPREADS, factor / (1.0 + min(1e6, progress / spread) ** 2)) * spread
