"""The rule that needs no threshold: it learns what is ordinary for a run and reports what is lost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

from hf_divguard.core.detection.eval_rise import EvalRise
from hf_divguard.core.detection.gradients import Gradients
from hf_divguard.core.detection.level import LossLevelMonitor
from hf_divguard.core.detection.nonfinite import NonFiniteRule
from hf_divguard.core.findings import SEVERITIES, Finding, Severity

__all__ = ["AdaptiveRule"]

_HUGE = 1e300


class AdaptiveRule:
    """Report a run that is losing what it has learnt, without a threshold to set.

    The rule learns the level, noise and movement of the loss from its ordinary values and
    measures every rise against them and against the progress ``P`` made so far. Shift or
    stretch the loss and the same steps are reported. Kinds and severities:

    - ``non_finite``, ``nan_filtered`` (error), ``scaler_skip`` (note): as in ``NonFiniteRule``;
    - ``jump`` (error): the loss rose at once by a quarter of ``P`` or more, has stayed up
      for 9 values or longer, and does not heal;
    - ``climb`` (error): it has crept up over the best level by 0.45 ``P`` or more;
    - ``plateau`` (error): its two best values were in the first eighth of the run, and it
      has kept far away from them since;
    - ``grad_explosion`` (warning): the gradient norm is 100 times the usual;
    - ``eval_climb`` (warning): the evaluation loss has turned and climbs;
    - ``spike`` (note): a value far above all others, which may heal.

    One incident gives one finding; the next one comes after the loss was ordinary again.

    Args:
        sensitivity: How readily level findings are made, above 0. Larger is earlier and
            louder: 2.0 asks for half the height and half the evidence. The default 1.0
            is what the tables of the documentation are measured with.
        scaler_patience: As in ``NonFiniteRule``.
        eval_severity: Severity of a climbing evaluation loss, ``"warning"`` by default,
            because the last checkpoint of an overfitted run is still a sound one.
        grace_values: Number of values, at least 0, in which no rise is judged after
            ``start_grace()``. The default 10 is one patience and one value.
        metric: Log key of the series, for messages.

    Raises:
        ValueError: If a setting is outside its range.
        TypeError: If a number of values or steps is not a whole number.

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
        2.017 before, 4 now (limit 2.6), 85% of the progress lost.
    """

    def __init__(
        self,
        *,
        sensitivity: float = 1.0,
        scaler_patience: int = 17,
        eval_severity: Severity = "warning",
        grace_values: int = 10,
        metric: str = "loss",
    ) -> None:
        if not (math.isfinite(sensitivity) and sensitivity > 0.0):
            raise ValueError(f"`sensitivity` must be a finite number above 0, got {sensitivity!r}.")
        if eval_severity not in get_args(Severity):
            raise ValueError(
                f"`eval_severity` must be one of {', '.join(SEVERITIES)}, got {eval_severity!r}."
            )
        if not isinstance(grace_values, int) or isinstance(grace_values, bool):
            raise TypeError(f"`grace_values` must be a whole number of values, got {grace_values!r}.")
        if grace_values < 0:
            raise ValueError(f"`grace_values` must be at least 0 values, got {grace_values!r}.")
        self.sensitivity = sensitivity
        self.eval_severity: Severity = eval_severity
        self.grace_values = grace_values
        self.metric = metric
        self._non_finite = NonFiniteRule(scaler_patience, metric=metric)
        self.reset()

    @property
    def scaler_patience(self) -> int:
        """Optimizer steps over which the gradient norm may stay non-finite beside a good loss."""
        return self._non_finite.scaler_patience

    @scaler_patience.setter
    def scaler_patience(self, n_steps: int) -> None:
        self._non_finite.scaler_patience = n_steps

    def reset(self) -> None:
        """Forget everything that was observed."""
        self._non_finite.reset()
        self._gradients = Gradients()
        self._watch = LossLevelMonitor(self._gradients, sensitivity=self.sensitivity, metric=self.metric)
        self._evaluations: dict[str, EvalRise] = {}

    def start_grace(self, n_values: int | None = None) -> None:
        """Keep what is ordinary, drop what is suspected, and judge no rise for a while.

        For after a resume or a rollback, when the loss is often higher for some values.
        Non-finite values are reported all the same.

        Args:
            n_values: Number of values to be silent for, at least 0; ``grace_values`` if not given.
        """
        self._watch.start_grace(self.grace_values if n_values is None else n_values)

    def observe(self, step: int, value: float, grad_norm: float | None = None) -> Finding | None:
        """Feed one training loss; return the most severe finding if there is one.

        Args:
            step: Optimizer step the value belongs to.
            value: The loss of the step, or its mean over a logging window.
            grad_norm: Gradient norm before clipping, or ``None`` if it is not known. It
                tells a loss that is being pulled back from one that is stuck.
        """
        value = float(value)
        finding = self._non_finite.observe(step, value, grad_norm)
        if not math.isfinite(value) or self._non_finite.is_masking:
            since = self._watch.suspected_since
            if finding is not None and since is not None:
                finding = replace(finding, onset_step=min(finding.onset_step, since))
            return finding
        gradient = None
        if grad_norm is not None and math.isfinite(grad_norm):
            gradient = float(grad_norm)
            self._gradients.see(gradient)
        explosion = self._gradients.judge(step)
        rise = self._watch.observe(step, max(-_HUGE, min(_HUGE, value)), gradient)
        found = [entry for entry in (finding, rise, explosion) if entry is not None]
        return max(found, key=lambda entry: SEVERITIES.index(entry.severity), default=None)

    def observe_eval(self, step: int, value: float, *, metric: str = "eval_loss") -> Finding | None:
        """Feed one evaluation loss; ``metric`` tells evaluation sets apart."""
        finding = self._non_finite.observe_eval(step, value, metric=metric)
        if not math.isfinite(value):
            return finding
        if metric not in self._evaluations:
            self._evaluations[metric] = EvalRise(metric=metric, severity=self.eval_severity)
        is_known = self._watch.level.count > 0 and not self._watch.is_suspecting
        training = self._watch.level.center if is_known else None
        return self._evaluations[metric].observe(step, float(value), training)

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the rule as JSON values, at most about 1500 numbers."""
        return {
            "non_finite": self._non_finite.state_dict(),
            "gradients": self._gradients.state_dict(),
            "watch": self._watch.state_dict(),
            "evaluations": {metric: rise.state_dict() for metric, rise in self._evaluations.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory that ``state_dict`` returned. Settings stay as constructed.

        Raises:
            ValueError: If the state does not fit this rule; the rule is left as it was.
        """
        gradients = Gradients()
        watch = LossLevelMonitor(gradients, sensitivity=self.sensitivity, metric=self.metric)
        evaluations: dict[str, EvalRise] = {}
        try:
            gradients.load_state_dict(state_dict["gradients"])
            watch.load_state_dict(state_dict["watch"])
            for metric, entry in state_dict["evaluations"].items():
                evaluations[metric] = EvalRise(metric=metric, severity=self.eval_severity)
                evaluations[metric].load_state_dict(entry)
            self._non_finite.load_state_dict(state_dict["non_finite"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"The state of the adaptive rule cannot be read: {error!r}.") from error
        self._gradients, self._watch, self._evaluations = gradients, watch, evaluations
