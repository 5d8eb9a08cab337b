"""Detection rules as ``TrainerCallback``s: they feed a rule and act on what it finds."""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

from transformers import TrainerCallback

from hf_divguard.core.detection.adaptive import AdaptiveRule
from hf_divguard.core.detection.detector import Rule, StepValues
from hf_divguard.core.detection.nonfinite import NonFiniteRule
from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import Action, RunOutcome, check_action
from hf_divguard.core.rollback.skipping import SKIPPED, SkippedUpdates
from hf_divguard.hf import control as switches
from hf_divguard.hf.callbacks import StandaloneStateKeeper
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.resume_conditions import changed_conditions, conditions_of
from hf_divguard.hf.skipping import NonFiniteUpdates

__all__ = ["DivergenceDetector", "RawLossDetector"]

logger = logging.getLogger(__name__)

_CONSEQUENCE = {
    "warn": "Training goes on.",
    "stop": "Training stops after this step's log, evaluation and save.",
    "abort": "Training ends now and nothing more is saved.",
}

# Rounds of logs (or evaluations) without the watched key after which the user is warned. An evaluation with
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
        self.action: Action = action  # type: ignore[assignment]
        self.metric_key = metric_key
        self.name = name
        self.findings: list[Finding] = []
        self.state_keeper = StandaloneStateKeeper(self)
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
        """After a rollback, take the memory of the restored step.

        Args:
            state_dict: That memory; ``None`` where none was kept. A rule that keeps bad
                values out of its baseline then only drops what it suspects, any other starts
                from scratch. So does one whose memory does not fit.
        """
        start_grace = getattr(self.rule, "start_grace", None)
        try:
            if state_dict is not None:
                self.load_state_dict(state_dict)
        except ValueError as error:
            logger.warning(
                "%s: its state in the restored checkpoint does not fit, so it starts from scratch: %s",
                self._label,
                error,
            )
            state_dict = None
        if state_dict is None and start_grace is None:
            self.rule.reset()
        if start_grace is not None:
            start_grace(0)
        self._just_logged = self._last_evaluated = None
        self._was_firing = ""

    # ---- the host's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start clean; with a stock Trainer that resumes, take the memory from the checkpoint."""
        if self.action == "rollback" and not self.state_keeper.kept_by_trainer:
            raise ValueError(
                f"{self._label}: `action='rollback'` needs `DivGuardTrainer`, which can put weights and optimizer back "
                "inside the running loop. With this trainer use 'stop', 'abort' or 'warn'."
            )
        self.rule.reset()
        self._forget_run()
        self._resumed_at = self._step(state) or None
        self.state_keeper.restore(args, state)
        self._tell_if_nothing_evaluates(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With a stock Trainer, put the memory beside the checkpoint that was just saved."""
        self.state_keeper.save(args, state)

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
        _mark_run_output(outcome_of(state), state, logs)
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
        switches.enforce_abort(outcome_of(state), control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep an aborted run from saving."""
        switches.enforce_abort(outcome_of(state), control)

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
        if self._has_ended or outcome_of(state).is_muted(step) or self._is_known(step, value):
            return
        self._handle(
            self._observe(self._count if step is None else step, value, values), args, state, control
        )

    def _is_known(self, step: int | None, value: float) -> bool:
        """Return whether this evaluation has been counted: logged twice, or repeated where training resumes."""
        if step is None or not self.metric_key.startswith("eval_"):
            return False
        last, self._last_evaluated = self._last_evaluated, (step, value)
        return step == self._resumed_at or (last is not None and last[0] == step and _same(last[1], value))

    def _observe(self, step: int, value: float, values: dict[str, Any]) -> Finding | None:
        """Give the rule one value; ``values`` is the complete log that it is from."""
        return self.rule.observe(step, value)

    def _handle(self, finding: Finding | None, args: Any, state: Any, control: Any) -> None:
        if finding is None:
            self._was_firing = ""
            return
        self.findings.append(finding)
        del self.findings[:-_MOST_FINDINGS]
        if finding.severity == "note":
            return
        # While a condition lasts it is one incident: a warning is logged once.
        what = f"{finding.metric} {finding.kind}"
        reported_before, self._was_firing = self._was_firing == what, what
        action = self.action if finding.severity == "error" else "warn"
        outcome = outcome_of(state)
        must_not_save = action == "abort" and not outcome.is_aborted
        if (outcome.finding is not None and not must_not_save) or (action == "warn" and reported_before):
            return
        if action == "rollback" and state is None:
            raise ValueError(
                "`action='rollback'` needs `DivGuardTrainer`; without a trainer use 'stop' or 'abort'."
            )
        if outcome.defers(finding, action):
            switches.suspend_save(control)
            return
        if _is_world_zero(state) and action != "rollback":  # a rollback reports itself when it is done
            logger.warning("%s: %s %s", self._label, finding.message, _CONSEQUENCE[action])
        outcome.report(finding, action)
        switches.apply(outcome, finding, action, args, control)

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
            and _is_world_zero(state)
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
        if _is_world_zero(state):
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


def _is_world_zero(state: Any) -> bool:
    """Return whether this process logs for the run; without a state it does."""
    return bool(getattr(state, "is_world_process_zero", True))


def _mark_run_output(outcome: RunOutcome, state: Any, logs: dict[str, Any] | None) -> None:
    """Write into the final log, which is also the run's output, that it did not finish normally."""
    if outcome.finding is not None and logs and "train_runtime" in logs:
        logs["divguard/finished"] = 0
        logs["divguard/stopped_at_step"] = state.global_step


class RawLossDetector(DivergenceDetector):
    """A detector whose rule takes the training loss with the gradient norm, and evaluation losses.

    Under ``DivGuardTrainer`` it is fed the unfiltered loss of every optimizer step; under
    the stock Trainer what is logged, and it says at the start what it cannot see there.

    Args:
        rule: An ``AdaptiveRule`` or ``NonFiniteRule``.
        action: ``"warn"``, ``"stop"``, ``"abort"`` or ``"rollback"``.
        metric_key: Key of the training loss in logs.
        name: Name of the memory in checkpoints.
    """

    rule: AdaptiveRule | NonFiniteRule

    def __init__(
        self,
        rule: AdaptiveRule | NonFiniteRule,
        *,
        action: str = "stop",
        metric_key: str = "loss",
        name: str | None = None,
    ) -> None:
        self.takes_raw_losses = False
        self._skipping: NonFiniteUpdates | None = None
        self._skipped = SkippedUpdates()
        self._scaler_patience = rule.scaler_patience
        self._tells_sets_apart = "metric_key" in inspect.signature(rule.observe_eval).parameters
        self._conditions: dict[str, Any] | None = None
        super().__init__(rule, action=action, metric_key=metric_key, name=name)

    def use_raw_losses(self, *, has_loss_scaler: bool, skipping: NonFiniteUpdates | None = None) -> None:
        """Take losses from the trainer instead of from logs.

        Args:
            has_loss_scaler: Whether a scaler searches its scale by overflowing. Without one
                a single non-finite gradient has gone into the weights.
            skipping: What leaves out updates that are not finite, if anything does.
        """
        self._skipping = skipping
        if skipping is not None:
            self._skipped = SkippedUpdates(skipping.max_in_a_row, counts_gradients=not has_loss_scaler)
        self.takes_raw_losses = self.metric_key == "loss"
        self.rule.scaler_patience = self._scaler_patience if has_loss_scaler else 1

    def use_logs(self) -> None:
        """Take losses from logs again."""
        self.takes_raw_losses, self._skipping = False, None
        self.rule.scaler_patience = self._scaler_patience

    # ---- memory

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the rule, and under which conditions the run trains."""
        own = {"conditions": self._conditions, "skipped": self._skipped.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a memory; judge no rise for a while if the run goes on under other conditions.

        A run that resumes as it was gives the same losses as if it had never been cut, and is
        judged the same. After a change of the learning rate, the batch size or the number of
        ranks, or without the optimizer's state, a loss is often higher for a while.

        Raises:
            ValueError: If the memory does not fit the rule.
        """
        state_dict = dict(state_dict)
        before, skipped = state_dict.pop("conditions", None), state_dict.pop("skipped", None)
        super().load_state_dict(state_dict)
        if skipped is not None:
            self._skipped.load_state_dict(skipped)
        changes = changed_conditions(before, self._conditions)
        start_grace = getattr(self.rule, "start_grace", None)
        if changes and start_grace is not None:
            start_grace()
            logger.info(
                "%s judges no rise of the loss for a while after this resume: %s.", self._label, changes
            )

    # ---- the host's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start clean, and say what cannot be seen from logs alone."""
        self._conditions = (
            conditions_of(args, on_logs=not self.takes_raw_losses) if args is not None else None
        )
        super().on_train_begin(args, state, control, **kwargs)
        if self.metric_key != "loss" or self.takes_raw_losses or args is None or not _is_world_zero(state):
            return
        unseen = []
        steps: Any = getattr(state, "logging_steps", None) or getattr(args, "logging_steps", 1)
        strategy = getattr(args.logging_strategy, "value", args.logging_strategy)
        if strategy == "no":
            unseen.append("any training loss (`logging_strategy` is 'no')")
        elif strategy != "steps" or steps > 1:
            span = "an epoch" if strategy == "epoch" else f"{steps:g} steps"
            unseen.append(f"single steps (a log is the mean of {span})")
        if strategy != "no" and getattr(args, "logging_nan_inf_filter", False):
            unseen.append("NaN losses that `logging_nan_inf_filter` hides, except by their gradient norm")
        if unseen:
            logger.warning(
                "%s works on logs here and cannot see: %s. `DivGuardTrainer` shows it every step.",
                self._label,
                "; ".join(unseen),
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Feed a log, unless the raw losses come from the trainer."""
        if self.takes_raw_losses:
            self._after_log(state, logs)
            return
        super().on_log(args, state, control, logs=logs, **kwargs)

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        """Feed the raw losses of the last few steps."""
        self._seen = True
        observe, outcome = self.rule.observe, outcome_of(state)
        for entry in values:
            if outcome.is_muted(entry.step):
                continue
            finding = self._if_skipped(observe(entry.step, entry.loss, entry.grad_norm), entry)
            if finding is None:
                self._was_firing = ""
                continue
            self._handle(finding, args, state, control)
            if control.should_training_stop and not outcome.is_aborted:
                switches.request_log(control)

    def _if_skipped(self, finding: Finding | None, entry: StepValues) -> Finding | None:
        """Return ``finding`` as it counts where an update that is not finite is left out."""
        if self._skipping is None:
            return finding
        judged = self._skipped.judge(entry.step, entry.loss, entry.grad_norm, finding)
        was_skipped = judged is not None and SKIPPED in judged.evidence
        return finding if was_skipped and not self._skipping.weights_are_finite() else judged

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Feed the evaluation loss, that of each evaluation set by itself."""
        if self.metric_key.startswith("eval_"):
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            return
        key = _evaluation_loss_key(metrics or {})
        value = (metrics or {}).get(key)
        step = self._step(state)
        if self._has_ended or not isinstance(value, (int, float)) or outcome_of(state).is_muted(step):
            return
        at = self._count if step is None else step
        if self._tells_sets_apart:
            finding = self.rule.observe_eval(at, float(value), metric_key=key)
        elif key == "eval_loss":
            finding = self.rule.observe_eval(at, float(value))
        else:
            return
        if finding is not None:
            self._handle(finding, args, state, control)

    def _observe(self, step: int, value: float, logs: dict[str, Any]) -> Finding | None:
        norm = logs.get("grad_norm") if self.metric_key == "loss" else None
        return self.rule.observe(step, value, float(norm) if isinstance(norm, (int, float)) else None)


def _evaluation_loss_key(metrics: dict[str, Any]) -> str:
    """Return the key of the loss in what one evaluation gave: ``eval_loss``, or ``eval_<set>_loss`` of its set.

    The prefix is known by the running time that every evaluation reports.

    Example:
        >>> _evaluation_loss_key({"eval_web_loss": 2.0, "eval_web_mlm_loss": 9.0, "eval_web_runtime": 0.5})
        'eval_web_loss'
    """
    for key in metrics:
        if key.startswith("eval_") and key.endswith("_runtime"):
            return key.removesuffix("_runtime") + "_loss"
    return "eval_loss"
