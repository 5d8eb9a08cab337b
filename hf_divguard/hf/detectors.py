"""Detection rules as ``TrainerCallback``s: they feed a rule and act on what it finds."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback

from hf_divguard.core.detection.detector import Rule
from hf_divguard.core.detection.ema import DualTimeScaleRule
from hf_divguard.core.detection.window import DualWindowRule
from hf_divguard.core.findings import Finding
from hf_divguard.core.metrics import greater_is_better as direction_of
from hf_divguard.hf.actions import (
    act_on,
    check_action,
    is_muted,
    is_world_zero,
    keep_aborted,
    mark_run_output,
)
from hf_divguard.hf.callback_state import StandaloneStateKeeper

__all__ = ["DivergenceDetector", "DualTimeScaleDivergenceDetector", "DualWindowDivergenceDetector"]

logger = logging.getLogger(__name__)

# Rounds of logs (or evaluations) without the watched key after which the user is told. An evaluation with
# several data sets is one round; the first train log may lack a key that later ones have.
_ROUNDS_BEFORE_MISSING = 3

# A detector that warns may find something in every log of a long run; what it keeps of that is bounded.
_MOST_FINDINGS = 1000


class DivergenceDetector(TrainerCallback):
    """Feeds one logged series to a rule and acts on its findings.

    The base of the detectors; use it directly for a rule of your own. Works with any
    ``Trainer``, and without one: ``args`` and ``state`` may be ``None``, and the
    ``control`` that is passed in is acted on.

    Every value counts once, although the Trainer hands the results of an evaluation
    to ``on_log`` and again to ``on_evaluate``. With the stock Trainer the memory of the
    rule is kept in ``checkpoint-N/divguard_state.json`` and comes back when training
    resumes from ``output_dir/checkpoint-N`` (or from ``args.resume_from_checkpoint``);
    ``DivGuardTrainer`` restores it from wherever it resumes.

    Args:
        rule: The rule to feed.
        action: What an error finding does: ``"warn"``, ``"stop"`` (after the step's log,
            evaluation and save) or ``"abort"`` (at once, saving nothing more).
        metric_key: Log key to watch, written as the Trainer logs it (``"loss"``,
            ``"eval_loss"``, ``"eval_accuracy"``).
        name: Name under which the memory is kept in checkpoints. Defaults to the class
            name; give one where two detectors of a class are used.

    Raises:
        ValueError: If ``action`` is unknown.
    """

    def __init__(
        self, rule: Rule, *, action: str = "stop", metric_key: str = "loss", name: str | None = None
    ) -> None:
        check_action(action)
        self.rule = rule
        self.action = action
        self.metric_key = metric_key
        self.name = name
        self.findings: list[Finding] = []
        self._keeper = StandaloneStateKeeper(self)
        self._forget_run()

    def _forget_run(self) -> None:
        self.findings.clear()
        self._just_logged: tuple[int | None, float] | None = None
        self._last_evaluated: tuple[int, float] | None = None
        self._resumed_at: int | None = None
        self._was_firing = ""
        self._has_ended = False
        self._seen = False
        self._told_missing = False
        self._missing_rounds: set[int] = set()
        self._count = 0

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the rule, without settings."""
        return self.rule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory; the settings stay as constructed.

        Raises:
            ValueError: If the memory does not fit the rule.
        """
        self.rule.load_state_dict(state_dict)

    def rewind(self, state_dict: dict[str, Any] | None) -> None:
        """After a rollback, take the memory of the step that was gone back to.

        Args:
            state_dict: That memory; ``None`` where none was kept. A rule that keeps bad
                values out of its baseline then only drops what it suspects, any other starts
                anew.
        """
        start_grace = getattr(self.rule, "start_grace", None)
        if state_dict is not None:
            self.load_state_dict(state_dict)
        elif start_grace is None:
            self.rule.reset()
        if start_grace is not None:
            start_grace(0)
        self._just_logged = self._last_evaluated = None
        self._was_firing = ""

    # ---- the host's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start clean; with a stock Trainer that resumes, take the memory from the checkpoint."""
        if self.action == "rollback" and not self._keeper.kept_by_trainer:
            raise ValueError(
                f"{self._label}: `action='rollback'` needs `DivGuardTrainer`, which can put weights and optimizer back "
                "inside the running loop. With this trainer use 'stop', 'abort' or 'warn'."
            )
        self.rule.reset()
        self._forget_run()
        self._resumed_at = self._step(state) or None
        self._keeper.restore(args, state)
        self._tell_if_nothing_evaluates(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With a stock Trainer, put the memory beside the checkpoint that was just saved."""
        self._keeper.save(args, state)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Feed the watched key of a log."""
        self._after_log(state, logs)
        value = self._value(logs)
        if value is None:
            return
        self._just_logged = (self._step(state), value)
        self._feed(logs or {}, value, args, state, control)

    def _after_log(self, state: Any, logs: dict[str, Any] | None) -> None:
        mark_run_output(state, logs)
        if (
            logs
            and "loss" in logs
            and self.metric_key not in logs
            and not self.metric_key.startswith("eval_")
        ):
            self._tell_if_missing(state, logs)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Feed the watched key of an evaluation, unless ``on_log`` has just brought the same value."""
        value = self._value(metrics)
        if value is None:
            if metrics and self.metric_key.startswith("eval_"):
                self._tell_if_missing(state, metrics)
            return
        logged, self._just_logged = self._just_logged, None
        if logged is not None and logged[0] == self._step(state) and _same(logged[1], value):
            return
        self._feed(metrics or {}, value, args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep an aborted run from saving."""
        keep_aborted(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep an aborted run from saving."""
        keep_aborted(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell once if the watched key never came; what is evaluated from now on is not this run."""
        self._has_ended = True
        if not self._seen and self._missing_rounds and not self._told_missing:
            self._warn_missing(state, {})

    # ---- feeding

    def _feed(self, values: dict[str, Any], value: float, args: Any, state: Any, control: Any) -> None:
        self._seen = True
        self._count += 1
        step = self._step(state)
        if self._has_ended or is_muted(state, step) or self._is_known(step, value):
            return
        self._handle(
            self._observe(self._count if step is None else step, value, values), args, state, control
        )

    def _is_known(self, step: int | None, value: float) -> bool:
        """Return whether this evaluation has been counted: logged twice, or made anew where training resumes."""
        if step is None or not self.metric_key.startswith("eval_"):
            return False
        last, self._last_evaluated = self._last_evaluated, (step, value)
        return step == self._resumed_at or (last is not None and last[0] == step and _same(last[1], value))

    def _observe(self, step: int, value: float, values: dict[str, Any]) -> Finding | None:
        """Give the rule one value; ``values`` is the whole log that it stood in."""
        return self.rule.observe(step, value)

    def _handle(self, finding: Finding | None, args: Any, state: Any, control: Any) -> None:
        if finding is None:
            self._was_firing = ""
            return
        self.findings.append(finding)
        del self.findings[:-_MOST_FINDINGS]
        if finding.severity == "note":
            return
        # While a condition lasts it is one incident: a warning is told once.
        what = f"{finding.metric} {finding.kind}"
        told_before, self._was_firing = self._was_firing == what, what
        action = self.action if finding.severity == "error" else "warn"
        has_ended_it = getattr(state, "divguard_finding", None) is not None
        must_not_save = action == "abort" and not getattr(state, "divguard_aborted", False)
        if (has_ended_it and not must_not_save) or (action == "warn" and told_before):
            return
        act_on(finding, action, args, state, control, source=self._label)

    @property
    def _label(self) -> str:
        return self.name or type(self).__name__

    @staticmethod
    def _step(state: Any) -> int | None:
        step = getattr(state, "global_step", None)
        return None if step is None else int(step)

    def _value(self, values: dict[str, Any] | None) -> float | None:
        if not values or self.metric_key not in values:
            return None
        try:
            return float(values[self.metric_key])
        except (TypeError, ValueError):
            return None

    def _tell_if_nothing_evaluates(self, args: Any, state: Any) -> None:
        strategy = getattr(args, "eval_strategy", None)
        evaluates = getattr(strategy, "value", strategy) != "no" or getattr(args, "eval_on_save", False)
        if (
            args is not None
            and self.metric_key.startswith("eval_")
            and not evaluates
            and is_world_zero(state)
        ):
            logger.warning(
                "%s watches `%s`, but `eval_strategy` is 'no': unless something else evaluates, nothing is guarded. "
                "Set `eval_strategy`, or watch `loss`.",
                self._label,
                self.metric_key,
            )

    def _tell_if_missing(self, state: Any, values: dict[str, Any]) -> None:
        if self._seen or self._told_missing:
            return
        step = self._step(state)
        self._missing_rounds.add(len(self._missing_rounds) if step is None else step)
        if len(self._missing_rounds) >= _ROUNDS_BEFORE_MISSING:
            self._warn_missing(state, values)

    def _warn_missing(self, state: Any, values: dict[str, Any]) -> None:
        self._told_missing = True
        if is_world_zero(state):
            there = f" Keys that are there: {sorted(values)}." if values else ""
            logger.warning(
                "%s watches `%s`, but that key has not come in %d rounds of logs: nothing is being guarded.%s "
                "Set `metric_key` to one of the logged keys.",
                self._label,
                self.metric_key,
                len(self._missing_rounds),
                there,
            )


def _same(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))


def _metric_key(metric_key: str | None, use_eval_loss: bool) -> str:
    return metric_key or ("eval_loss" if use_eval_loss else "loss")


def _direction(metric_key: str, greater_is_better: bool | None) -> bool:
    if greater_is_better is not None:
        return greater_is_better
    known = direction_of(metric_key)
    if known is None:
        logger.warning(
            "The direction of `%s` is not known; a rise is taken for the trouble. Set `greater_is_better` to say it.",
            metric_key,
        )
    return bool(known)


class DualTimeScaleDivergenceDetector(DivergenceDetector):
    """Acts when a fast moving average runs away from a slow one.

    Both averages start at the first value and follow ``e = a * x + (1 - a) * e``; it
    fires when ``short_ema - long_ema >= threshold``. A NaN or infinite value never
    enters an average and is itself a finding. The threshold is in the units of the
    metric: at the defaults a lasting jump below 2.83 never fires. Its memory is
    ``short_ema``, ``long_ema`` and ``initialized``.

    Args:
        short_alpha: Weight of a new value in the fast average, in (0, 1]; larger reacts
            faster. Default as in forgather's detector of the same name.
        long_alpha: Weight of a new value in the slow average, in (0, 1].
        threshold: Smallest gap that fires, in the units of the metric; larger is quieter.
        action: ``"stop"``: the step's log, evaluation and a save take place, then
            training ends. ``"abort"``: training ends and nothing more is saved, not even
            a save that is due at that step. ``"warn"``: only tell.
        use_eval_loss: Watch ``eval_loss``; else ``loss``.
        metric_key: Log key to watch instead, as the Trainer logs it.
        greater_is_better: Whether a drop is the trouble (accuracy). ``None`` takes it
            from the name of the metric.
        name: Name of the memory in checkpoints; needed to tell two detectors apart.

    Raises:
        ValueError: If an alpha is outside (0, 1], ``threshold`` is not finite, or
            ``action`` is unknown.

    Example:
        >>> from transformers import TrainerControl
        >>> detector, control = DualTimeScaleDivergenceDetector(threshold=1.0, use_eval_loss=False), TrainerControl()
        >>> for loss in [2.0] * 20 + [6.0] * 5:
        ...     detector.on_log(None, None, control, logs={"loss": loss})
        >>> control.should_training_stop, detector.findings[0].step
        (True, 24)
    """

    def __init__(
        self,
        short_alpha: float = 0.1,
        long_alpha: float = 0.01,
        threshold: float = 2.0,
        action: str = "stop",
        use_eval_loss: bool = True,
        metric_key: str | None = None,
        greater_is_better: bool | None = None,
        name: str | None = None,
    ) -> None:
        key = _metric_key(metric_key, use_eval_loss)
        rule = DualTimeScaleRule(
            short_alpha,
            long_alpha,
            threshold,
            metric=key,
            greater_is_better=_direction(key, greater_is_better),
        )
        super().__init__(rule, action=action, metric_key=key, name=name)


class DualWindowDivergenceDetector(DivergenceDetector):
    """Acts when the mean of the last few values runs away from the mean of the last many.

    Silent until the long window is full; fires when
    ``mean(short) - mean(long) >= threshold``. A NaN or infinite value never enters a
    window and is itself a finding. Its memory is ``short_buffer`` and ``long_buffer``.

    Args:
        short_window: Values in the short window, at least 1. Counted in log events (or
            evaluations), not in optimizer steps. Default as in forgather's detector.
        long_window: Values in the long window, at least 1.
        threshold: Smallest gap that fires, in the units of the metric; larger is quieter.
        action: ``"stop"``, ``"abort"`` or ``"warn"``, as for
            :class:`DualTimeScaleDivergenceDetector`.
        use_eval_loss: Watch ``eval_loss``; else ``loss``.
        metric_key: Log key to watch instead, as the Trainer logs it.
        greater_is_better: Whether a drop is the trouble (accuracy). ``None`` takes it
            from the name of the metric.
        name: Name of the memory in checkpoints; needed to tell two detectors apart.

    Raises:
        ValueError: If a window is shorter than 1, ``threshold`` is not finite, or
            ``action`` is unknown.
        TypeError: If a window is not a whole number.

    Example:
        >>> from transformers import TrainerControl
        >>> control = TrainerControl()
        >>> detector = DualWindowDivergenceDetector(2, 4, threshold=0.1, metric_key="eval_accuracy", action="abort")
        >>> for accuracy in [0.9, 0.9, 0.9, 0.9, 0.5]:
        ...     detector.on_evaluate(None, None, control, metrics={"eval_accuracy": accuracy})
        >>> control.should_training_stop, control.should_save
        (True, False)
    """

    def __init__(
        self,
        short_window: int = 10,
        long_window: int = 100,
        threshold: float = 2.0,
        action: str = "stop",
        use_eval_loss: bool = True,
        metric_key: str | None = None,
        greater_is_better: bool | None = None,
        name: str | None = None,
    ) -> None:
        key = _metric_key(metric_key, use_eval_loss)
        rule = DualWindowRule(
            short_window,
            long_window,
            threshold,
            metric=key,
            greater_is_better=_direction(key, greater_is_better),
        )
        super().__init__(rule, action=action, metric_key=key, name=name)
