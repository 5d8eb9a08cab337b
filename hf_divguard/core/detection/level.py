"""The level of a loss: whether it jumped, climbs or is stuck, measured against the run itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_divguard.core.detection.baseline import (
    CERTAIN_NOISES,
    HUGE,
    LONGEST_WINDOW,
    PATIENCE,
    RobustBaseline,
)
from hf_divguard.core.detection.bounds import (
    CLIMB_SPREADS,
    FULL_SHARE,
    JUMP_SHARE,
    LEAST_PATIENCE,
    RiseBounds,
    climb_bound,
    rise_bounds,
)
from hf_divguard.core.detection.cusum import PULL, RiseCusum
from hf_divguard.core.detection.first_rise import FirstRise
from hf_divguard.core.detection.gradients import Gradients
from hf_divguard.core.detection.sorted_window import median
from hf_divguard.core.detection.surge import FALL, FALL_OF_MEANS, SURGE, Surge
from hf_divguard.core.findings import Finding, Kind, Severity, rise_in_words
from hf_divguard.core.state import Stateful, memory

__all__ = ["LossLevelMonitor"]

# docs/detectors.md gives the source of each number.
SILENT_VALUES = 5
HISTORY_PER_SURGE = 3
JUMP_SCORE = 8.0
CLIMB_SCORE = 30.0
SLOW_RISE = 20
PLATEAU_RATIO = 8


@dataclass
class LossLevelMonitor(Stateful):
    """Find rises of one series that last, among noise, spikes and rises that recover.

    Args:
        sensitivity: How readily findings are made. 2.0 asks for half the height and half
            the evidence of 1.0.
        metric_key: Log key of the series, for messages.
        sign: 1 where a rise is bad. With -1 the series is fed with its sign changed, and
            findings are about the series as it is logged.

    Example:
        >>> monitor = LossLevelMonitor()
        >>> kinds = []
        >>> for step in range(80):
        ...     finding = monitor.observe(step, 1.0 if step < 50 else 3.0, None)
        ...     kinds += [(step, finding.kind)] if finding else []
        >>> kinds
        [(50, 'spike'), (53, 'jump')]
    """

    sensitivity: float = 1.0
    metric_key: str = "loss"
    sign: float = 1.0

    gradients: Gradients = memory(Gradients)
    level: RobustBaseline = memory(RobustBaseline)
    grace: int = memory(0)
    _recovered: float = memory(0.0)
    _calm_step: int | None = memory(None)
    _lowest_step: int | None = memory(None)
    _jump: RiseCusum = memory(RiseCusum)
    _climb: RiseCusum = memory(RiseCusum)
    _surge: Surge = memory(Surge)
    _first_rise: FirstRise = memory(FirstRise)
    _step: int | None = memory(None)
    _gap: int = memory(1)
    _is_open: bool = memory(False)

    def start_grace(self, values: int) -> None:
        """Keep the baseline, drop what is suspected, and judge no rise for ``values`` values."""
        self.grace = values
        self._jump, self._climb = RiseCusum(), RiseCusum()
        self._surge.clear()
        self._first_rise.end()
        self._step, self._gap, self._is_open = None, 1, False

    @property
    def is_open(self) -> bool:
        """Whether the loss has not been back at its baseline since the last error finding."""
        return self._is_open

    def end_incident(self) -> None:
        """Report a rise that lasts once more."""
        self._is_open = False

    @property
    def is_suspecting(self) -> bool:
        """Whether values are being kept out of the level, so that it is not where the loss is."""
        return self._is_open or self._jump.score > 0.0

    @property
    def suspected_since(self) -> int | None:
        """Step since which a rise is suspected; ``None`` while there is little to suspect."""
        return self._jump.onset_step if self._jump.score > 0.5 * JUMP_SCORE else None

    @property
    def pending_since(self) -> int | None:
        """First step of a rise that is not judged yet, however little speaks for it; ``None`` if there is none.

        One value that is clearly up is enough: it is for what must not be deleted yet.
        """
        return self._jump.onset_step if self._jump.score > 0.5 else None

    def observe(self, step: int, value: float, gradient: float | None) -> Finding | None:
        """Feed one finite value with its finite gradient norm, if known; return a finding if there is one."""
        if self._step is not None and step > self._step:
            self._gap = step - self._step
        self._step = step
        level = self.level
        if level.see(value):
            self._lowest_step = step
        has_risen = self.sign > 0 and not self._first_rise.is_over and self._first_rise.observe(value)
        if level.count <= SILENT_VALUES:
            self._accept(step, value, gradient, math.inf)
            return None
        if self.grace > 0:
            self.grace -= 1
            if value <= level.upper:
                self._accept(step, value, gradient, math.inf)
            return None
        if self._is_calm(value):
            self._jump.rest(step)
            self._climb.rest(step)
            self._calm_step = step
            level.accept(value)
            if gradient is not None:
                self.gradients.accept(gradient, LONGEST_WINDOW)
            if self._recovered or self._surge.highest:
                self._fade()
            return None
        bounds = rise_bounds(level, self._recovered, gap=self._gap, sensitivity=self.sensitivity)
        center, best = level.center, level.best_or_center
        kind = self._judge_jump(step, value, bounds, center)
        kind = kind or self._judge_climb(step, value, bounds, best) or self._judge_plateau()
        note = self._spike(step, value, bounds) if len(self._jump.values) == 1 else None
        finding = self._level_finding(kind, step, value, bounds) if kind and not self._is_open else note
        # Of single steps the first few may do so: only entries that are means are judged.
        if has_risen and self._gap > 1 and kind is None and not self._is_open:
            kind, finding = "climb", self._first_rise.finding(step, value, self.metric_key)
        self._is_open = self._is_open or kind is not None
        if self._jump.score == 0.0:
            if self._climb.score == 0.0 and not kind:
                self._is_open = False
            self._accept(step, value, gradient, best + 0.25 * bounds.climb)
        return finding

    def _is_calm(self, value: float) -> bool:
        """Return whether ``value`` is certainly nothing to judge: nothing is suspected, and it lies near the best level.

        Saves most of the work for most values. What it compares with is never above the bounds
        that would be compared with otherwise, so that the findings are the same.
        """
        level = self.level
        if self._is_open or self._jump.score or self._climb.score or self._surge.length:
            return False
        best, median_now = level.best, level.level
        # A value below the upper edge of a full window is no surge: the reach is larger than that.
        if not level.is_full or value > level.upper or best is None or median_now is None:
            return False
        if level.count >= PLATEAU_RATIO * level.lowest_count:
            return False
        # A value at most as high as a bound keeps the level, a median, at most as high as the bound.
        highest = value if value > median_now else median_now
        if highest <= best + 0.25 * FULL_SHARE * level.progress / self.sensitivity:
            return True
        climb = climb_bound(level) / self.sensitivity
        return highest <= best + 0.25 * climb and value - best <= climb

    def _judge_jump(self, step: int, value: float, bounds: RiseBounds, center: float) -> Kind | None:
        rise, was_rising = self._jump, self._jump.score > 0.0
        rise.add(step, value, (value - self.level.upper) / bounds.jump_scale, bounds.weight)
        if self._is_surge(value - center, bounds, center):
            return "jump"
        if self.level.is_policy_like:
            # Its level says nothing, so that all but a surge belongs to the baseline.
            if self._surge.length == 0:
                self._take_back()
            return None
        if rise.score == 0.0:
            if was_rising:
                self._take_back()
            return None
        height, count = rise.late_level() - center, len(rise.values) * bounds.weight
        if count >= 6.0:
            rise.peak = max(rise.peak, min(height, HUGE))
        if rise.score >= JUMP_SCORE / self.sensitivity:
            is_up = rise.late_level(0.25) - center >= bounds.jump
            if not self._is_open and is_up and not self._is_recovering(rise, center, bounds.jump, bounds):
                return "jump"
            rise.score = min(rise.score, 2.0 * JUMP_SCORE / self.sensitivity)
        if count > SLOW_RISE and (rise.peak < bounds.jump or height < 0.5 * bounds.jump):
            # Over, or too slow or too small: part of the baseline now; a climb is measured from the best level.
            self._take_back()
        return None

    def _is_surge(self, height: float, bounds: RiseBounds, center: float) -> bool:
        """Return whether the last values in a row lie so far above all before that few of them are enough."""
        # Without progress a series has no range but its noise, which may have long tails.
        reach = max(self.level.reach, self._surge.highest) * (SURGE if bounds.is_unlearnt else 1.0)
        reach = max(reach, abs(center), 1e-300)
        pull = self.gradients.pull(1) if height > reach else None
        patience = max(LEAST_PATIENCE, min(PATIENCE, self.level.count / HISTORY_PER_SURGE))
        is_pulled = pull is not None and pull > PULL
        # An entry that is the mean of many steps does not come back within one of them.
        fall = FALL if self._gap < PATIENCE else FALL_OF_MEANS
        self._surge.add(height, reach=reach, least=PATIENCE / patience, is_pulled=is_pulled)
        if (
            self._is_open
            or not self._jump.values
            or not self._surge.is_over(JUMP_SCORE / self.sensitivity, reach, fall)
        ):
            return False
        is_extreme = self._surge.last >= SURGE * reach
        return is_extreme or not self._is_recovering(self._jump, center, bounds.jump, bounds)

    def _judge_climb(self, step: int, value: float, bounds: RiseBounds, best: float) -> Kind | None:
        climb = self._climb
        climb.add(step, value, (value - best - bounds.climb) / bounds.climb_scale, bounds.weight)
        if climb.score < CLIMB_SCORE / self.sensitivity or self._is_open or self.level.is_policy_like:
            return None
        if median(climb.values[-PATIENCE:]) - best < bounds.climb:
            return None
        return None if self._is_recovering(climb, best, bounds.climb, bounds) else "climb"

    def _judge_plateau(self) -> Kind | None:
        level = self.level
        (lowest, first), (second, other) = level.lowest
        if level.count < PLATEAU_RATIO * max(2, first, other) or level.is_policy_like:
            return None
        gained, lost, gap = level.initial - lowest, level.center - lowest, level.lower - second
        noise = CERTAIN_NOISES * max(level.noise, level.noise_at_best)
        if gained <= max(noise, JUMP_SHARE * abs(level.initial)) or min(gap, lost) <= noise or gap <= 0.0:
            return None
        return "plateau" if lost >= JUMP_SHARE / self.sensitivity * gained else None

    def _is_recovering(self, rise: RiseCusum, base: float, need: float, bounds: RiseBounds) -> bool:
        pull = self.gradients.pull(len(rise.values))
        return rise.is_recovering(base, need, bounds.progress, pull, bounds.weight)

    def _take_back(self) -> None:
        """Let the values of a rise that is over into the baseline, so that the next such rise is in range."""
        rise = self._jump
        if len(rise.values) >= PATIENCE or rise.highest_score >= 0.5 * JUMP_SCORE:
            self._recovered = max(self._recovered, rise.peak)
        for value in rise.values[-SLOW_RISE:]:
            self.level.accept(value)
        rise.clear()

    def _accept(self, step: int, value: float, gradient: float | None, calm: float) -> None:
        level = self.level
        level.accept(value)
        if gradient is not None:
            self.gradients.accept(gradient, level.size)
        if level.level is not None and level.level <= calm:
            self._calm_step = step
        if self._recovered or self._surge.highest:
            self._fade()

    def _fade(self) -> None:
        """Lower the bar that recovered rises have raised: for as long again as the run had lasted, and ever less."""
        fading = 0.5 ** (1.0 / self.level.count)
        self._recovered *= fading
        self._surge.highest *= fading

    # ---- findings

    def _spike(self, step: int, value: float, bounds: RiseBounds) -> Finding | None:
        limit = self.level.upper + max(bounds.jump, CLIMB_SPREADS * 0.5 * self.level.spread)
        if value < limit or self._is_open:
            return None
        side = "above" if self.sign > 0 else "below"
        message = (
            f"`{self.metric_key}` = {self.sign * value:.4g} at step {step} is a spike: {side} {self.sign * limit:.4g}, "
            f"while the baseline is {self.sign * self.level.center:.4g}."
        )
        evidence = {"baseline": self.sign * self.level.center, "spread": self.level.spread}
        return self._finding("spike", "note", (step, step), (value, limit), message, evidence)

    def _level_finding(self, kind: Kind, step: int, value: float, bounds: RiseBounds) -> Finding:
        level, best = self.level, self.level.best_or_center
        up, climbed, sign = ("up", "climbed", 1.0) if self.sign > 0 else ("down", "fallen", -1.0)
        if kind == "jump":
            before, now, limit = level.center, self._jump.late_level(), level.center + bounds.jump
            onset = step if self._jump.onset_step is None else min(step, self._jump.onset_step)
            said = f"has stayed {up} since it {'jumped' if sign > 0 else 'dropped'} at step {onset}"
            at = "before"
        elif kind == "climb":
            before, now, limit = best, median(self._climb.values[-PATIENCE:]), best + bounds.climb
            onset, at = _after(self._calm_step, step), "at its best"
            said = f"has {climbed} from step {onset} on"
        else:
            before, now, limit = level.lowest[0][0], level.center, level.lowest[1][0]
            onset, at = _after(self._lowest_step, step), "at its best"
            said = f"has been stuck from step {onset} on"
        evidence = {"before": sign * before, "now": sign * now, "best": sign * best}
        evidence |= {"progress": bounds.progress, "noise": level.noise}
        if bounds.progress > 0.0:
            evidence["lost_share"] = (now - before) / bounds.progress
        pull = self.gradients.pull()
        if pull is not None:
            evidence["grad_norm_ratio"] = pull
        lost = rise_in_words(before, now, bounds.progress)
        message = (
            f"`{self.metric_key}` = {sign * value:.4g} at step {step} {said}: {sign * before:.4g} {at}, "
            f"{sign * now:.4g} now (limit {sign * limit:.4g}){f', {lost}' if lost else ''}."
        )
        named: Kind = "drop" if sign < 0 and kind != "plateau" else kind
        return self._finding(named, "error", (step, onset), (value, limit), message, evidence)

    def _finding(
        self,
        kind: Kind,
        severity: Severity,
        steps: tuple[int, int],
        values: tuple[float, float],
        message: str,
        evidence: dict[str, float],
    ) -> Finding:
        return Finding(
            step=steps[0],
            onset_step=steps[1],
            kind=kind,
            severity=severity,
            metric=self.metric_key,
            value=self.sign * values[0],
            limit=self.sign * values[1],
            message=message,
            evidence=dict(evidence),
        )


def _after(last_good: int | None, step: int) -> int:
    """Return the first step that may be bad, at most ``step``."""
    return step if last_good is None else min(step, last_good + 1)
