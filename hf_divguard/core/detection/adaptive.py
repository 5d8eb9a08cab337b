"""The rule that needs no threshold: it learns the normal range of a run and reports lasting loss of progress."""

from __future__ import annotations

import math
import warnings
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

from hf_divguard.core.detection.baseline import HUGE
from hf_divguard.core.detection.detector import check_setting
from hf_divguard.core.detection.eval_rise import EvalRise
from hf_divguard.core.detection.level import LossLevelMonitor
from hf_divguard.core.detection.nonfinite import NonFiniteRule
from hf_divguard.core.findings import SEVERITIES, Finding, Severity
from hf_divguard.core.metrics import greater_is_better as direction_of
from hf_divguard.core.state import Stateful, memory

__all__ = ["AdaptiveRule"]


@dataclass
class AdaptiveRule(Stateful):
    """Report a run that is losing what it has learnt, without a threshold to set.

    The rule learns the level, noise and movement of the loss from the values in its normal
    range and measures every rise against them and against the progress ``P`` made so far.
    Shifting or scaling the loss does not change what is reported. Kinds and severities:

    - ``non_finite``, ``nan_filtered`` (error), ``scaler_skip`` (note): as in ``NonFiniteRule``;
    - ``jump`` (error): the loss rose at once by 0.22 ``P`` or more, has stayed up
      for 9 values or longer, and does not recover; the higher it rose above everything
      before, the fewer values are needed, down to 2, or 1 at a thousand times;
    - ``climb`` (error): it has crept up over the best level by 0.4 ``P`` or more;
    - ``drop`` (error): a jump or climb of a metric whose greater values are better;
    - ``plateau`` (error): its two best values were in the first eighth of the run, and it
      has kept far away from them since;
    - ``grad_explosion`` (warning): the gradient norm is 100 times its baseline;
    - ``eval_climb`` (warning): the evaluation loss has turned and climbs;
    - ``spike`` (note): a value far above all others, which may recover.

    One incident gives one finding; the next one comes after the loss has returned to its baseline.

    Args:
        sensitivity: How readily level findings are made, above 0. Larger is earlier and
            louder: 2.0 asks for half the height and half the evidence. The default 1.0
            is what the tables of the documentation are measured with.
        scaler_patience: As in ``NonFiniteRule``.
        eval_severity: Severity of a climbing evaluation loss, ``"warning"`` by default,
            because the last checkpoint of an overfitted run is still a good one.
        grace_values: Number of values, at least 0, in which no rise is judged after
            ``start_grace()``. The default 10 is one patience and one value.
        greater_is_better: Whether a drop of the metric is bad. ``None`` takes it from the
            name of the metric; where that is not known, only values that are not finite
            are reported, with a warning at the start.
        metric_key: Log key of the series, for messages.

    Raises:
        ValueError: If a setting is outside its range.
        TypeError: If a setting is not a number, or not a whole number where it counts.

    Example:
        >>> rule = AdaptiveRule()
        >>> findings = [rule.observe(step, 2.0 + 3.0 * 0.9**step) for step in range(60)]
        >>> findings += [rule.observe(step, 4.0) for step in range(60, 80)]
        >>> found = [finding for finding in findings if finding and finding.severity == "error"]
        >>> [(finding.kind, finding.onset_step, finding.step) for finding in found]
        [('jump', 60, 68)]
        >>> for part in found[0].message.split(": "):
        ...     print(part)
        `loss` = 4 at step 68 has stayed up since it jumped at step 60
        2.009 before, 4 now (limit 2.603), 74% of the progress lost.
    """

    name: ClassVar[str] = "adaptive"

    _: KW_ONLY
    sensitivity: float = 1.0
    scaler_patience: int = 17
    eval_severity: Severity = "warning"
    grace_values: int = 10
    greater_is_better: bool | None = None
    metric_key: str = "loss"

    _non_finite: NonFiniteRule = memory(NonFiniteRule)
    _watch: LossLevelMonitor = memory(LossLevelMonitor)
    _evaluations: dict[str, EvalRise] = memory(dict)

    def __post_init__(self) -> None:
        check_setting(self.name, "sensitivity", self.sensitivity, above=0)
        check_setting(self.name, "scaler_patience", self.scaler_patience, at_least=1, unit="step")
        check_setting(self.name, "grace_values", self.grace_values, at_least=0, unit="value")
        if self.eval_severity not in SEVERITIES:
            raise ValueError(
                f"`eval_severity` must be one of {', '.join(SEVERITIES)}, got {self.eval_severity!r} "
                f"(detector {self.name!r})."
            )
        self._direction = (
            direction_of(self.metric_key) if self.greater_is_better is None else self.greater_is_better
        )
        if self._direction is None:
            warnings.warn(
                f"The direction of `{self.metric_key}` must be known to judge its level, and its name does not say it: "
                "only values that are not finite are reported. Set `greater_is_better` to true or false.",
                UserWarning,
                stacklevel=3,
            )
        self.reset()

    def reset(self) -> None:
        """Forget everything that was observed."""
        super().reset()
        self._non_finite.metric_key = self._watch.metric_key = self.metric_key
        self._watch.sensitivity, self._watch.sign = self.sensitivity, -1.0 if self._direction else 1.0

    def start_grace(self, values: int | None = None) -> None:
        """Keep the baseline, drop what is suspected, and judge no rise for a while.

        For after a resume or a rollback, when the loss is often higher for some values.
        Non-finite values are reported all the same.

        Args:
            values: Number of values without a judgement, at least 0; ``grace_values`` if not given.
        """
        self._watch.start_grace(self.grace_values if values is None else values)

    @property
    def is_open(self) -> bool:
        """Whether the condition of the last error finding lasts."""
        return self._non_finite.is_open or self._watch.is_open

    @property
    def pending_since(self) -> int | None:
        """First step of a rise that is not judged yet; ``None`` if there is none."""
        return self._watch.pending_since

    def end_incident(self) -> None:
        """Report a condition that lasts once more."""
        self._non_finite.end_incident()
        self._watch.end_incident()

    def observe(self, step: int, value: float, grad_norm: float | None = None) -> Finding | None:
        """Feed one training loss; return the most severe finding if there is one.

        Args:
            step: Optimizer step the value belongs to.
            value: The loss of the step, or its mean over a logging window.
            grad_norm: Gradient norm before clipping, or ``None`` if it is not known. It
                separates a loss that is being pulled back from one that is stuck.
        """
        value, watch = float(value), self._watch
        self._non_finite.scaler_patience = self.scaler_patience
        finding = self._non_finite.observe(step, value, grad_norm)
        if not math.isfinite(value) or self._non_finite.is_masking:
            since = watch.suspected_since
            if finding is not None and since is not None:
                finding = replace(finding, onset_step=min(finding.onset_step, since))
            return finding
        if self._direction is None:
            return finding
        gradient = None
        if grad_norm is not None and math.isfinite(grad_norm):
            gradient = float(grad_norm)
            watch.gradients.see(gradient)
        explosion = watch.gradients.judge(step)
        rise = watch.observe(
            step, watch.sign * (value if -HUGE < value < HUGE else math.copysign(HUGE, value)), gradient
        )
        if finding is None and rise is None and explosion is None:
            return None
        found = [entry for entry in (finding, rise, explosion) if entry is not None]
        return max(found, key=lambda entry: SEVERITIES.index(entry.severity), default=None)

    def observe_eval(self, step: int, value: float, *, metric_key: str = "eval_loss") -> Finding | None:
        """Feed one evaluation loss; ``metric_key`` separates evaluation sets."""
        finding = self._non_finite.observe_eval(step, value, metric_key=metric_key)
        if not math.isfinite(value):
            return finding
        is_known = self._watch.level.count > 0 and not self._watch.is_suspecting
        training = self._watch.level.center if is_known else None
        rise = self._evaluations.setdefault(metric_key, EvalRise())
        return rise.observe(step, float(value), training, metric_key=metric_key, severity=self.eval_severity)
