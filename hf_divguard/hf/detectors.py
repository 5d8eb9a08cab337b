"""Detection rules as ``TrainerCallback``s: they feed a rule and act on what it finds."""

from __future__ import annotations

import logging
import math
from typing import Any

from transformers import TrainerCallback

from hf_divguard.core.detection.detector import IncidentRule, Rule, StepValues
from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import Action, RunOutcome, check_action
from hf_divguard.core.rollback.skipping import SKIPPED
from hf_divguard.hf import control as switches
from hf_divguard.hf.arguments import changed_options
from hf_divguard.hf.callbacks import StandaloneStateKeeper
from hf_divguard.hf.control import is_world_zero, outcome_of
from hf_divguard.hf.unguarded import warn_if_unguarded
from hf_divguard.hf.watched_key import WatchedKey

__all__ = ["DivergenceDetector"]

logger = logging.getLogger(__name__)

_CONSEQUENCE = {
    "warn": "Training goes on.",
    "stop": "Training stops after this step's log, evaluation and save.",
    "abort": "Training ends now and nothing more is saved.",
}

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
        self._key = WatchedKey(self._label, self.metric_key)
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
        if not self.state_keeper.kept_by_trainer:
            warn_if_unguarded(args, changed_options(args))
        self.rule.reset()
        self._forget_run()
        self._resumed_at = self._step(state) or None
        self.state_keeper.restore(args, state)
        self._key.warn_if_nothing_evaluates(args, state)

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
        switches.mark_run_output(state, logs)
        if (
            logs
            and "loss" in logs
            and self.metric_key not in logs
            and not self.metric_key.startswith("eval_")
        ):
            self._key.is_missing_in(state, logs)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Feed the watched key of an evaluation, unless ``on_log`` has just brought the same value."""
        value = self._value(metrics)
        if value is None:
            if metrics and self.metric_key.startswith("eval_"):
                self._key.is_missing_in(state, metrics)
            elif metrics:
                self._key.is_named_otherwise_in(state, metrics)
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
        self._key.warn_if_it_never_came(state)

    # ---- feeding

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        """Feed the raw losses of the last few steps, with their gradient norms, to a rule that takes both."""
        self._key.was_seen = True
        rule: Any = self.rule
        outcome = outcome_of(state)
        for entry in values:
            if outcome.is_muted(entry.step):
                continue
            finding = self._if_skipped(rule.observe(entry.step, entry.loss, entry.grad_norm), entry)
            if finding is None:
                self._end_condition(outcome)
                continue
            self._handle(finding, args, state, control)
            if control.should_training_stop and not outcome.is_aborted:
                switches.request_log(control)

    def _feed(self, values: dict[str, Any], value: float, args: Any, state: Any, control: Any) -> None:
        self._key.was_seen = True
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

    def _if_skipped(self, finding: Finding | None, entry: StepValues) -> Finding | None:
        """Return ``finding`` as it counts where an update that is not finite is skipped."""
        return finding

    def _handle(self, finding: Finding | None, args: Any, state: Any, control: Any) -> None:
        outcome = outcome_of(state)
        if finding is None:
            self._end_condition(outcome)
            return
        self.findings.append(finding)
        del self.findings[:-_MOST_FINDINGS]
        if finding.severity == "note":
            return
        # While a condition lasts it is one incident: a warning is logged once.
        what = f"{finding.metric} {finding.kind}"
        reported_before, self._was_firing = self._was_firing == what, what
        action = self.action if finding.severity == "error" else "warn"
        if finding.severity == "error":
            outcome.open_condition(self._label, finding)
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
        if is_world_zero(state) and action != "rollback":  # a rollback reports itself when it is done
            logger.warning("%s: %s %s", self._label, finding.message, _CONSEQUENCE[action])
        if finding.severity == "error":
            outcome.report(finding, action)
        elif SKIPPED not in finding.evidence:  # a skipped update has an event of its own
            outcome.record(finding, action)
        switches.apply(outcome, finding, action, args, control)

    def _end_condition(self, outcome: RunOutcome) -> None:
        """After a value without a finding: the condition is over, unless the rule says that it lasts."""
        self._was_firing = ""
        if outcome.conditions and not getattr(self.rule, "is_open", False):
            outcome.close_condition(self._label)

    @property
    def pending_since(self) -> int | None:
        """First step of what may become a finding; ``None`` if nothing may."""
        return getattr(self.rule, "pending_since", None)

    def judge_again(self) -> None:
        """Report a condition that lasts once more: for a resume from a checkpoint that was saved under it."""
        if isinstance(self.rule, IncidentRule):
            self.rule.end_incident()

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


def _same(first: float, second: float) -> bool:
    return first == second or (math.isnan(first) and math.isnan(second))
