"""The parts of one guarded ``train()`` call: made and switched on at its start, switched off on every way out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from hf_divguard.alerts.alerts import Hook
from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector
from hf_divguard.hf.arguments import options_of
from hf_divguard.hf.callbacks import RunCallbacks, is_stateful
from hf_divguard.hf.comparison import Comparison
from hf_divguard.hf.comparison_of_run import make_comparison
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.ending import Ending
from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.evaluation import Evaluations
from hf_divguard.hf.folder_locks import FolderLocks
from hf_divguard.hf.host import Host
from hf_divguard.hf.journal import RunJournal
from hf_divguard.hf.losses import StepLosses
from hf_divguard.hf.options.saving import asks_for_safe_saves
from hf_divguard.hf.options.values import signals_of
from hf_divguard.hf.policy_gradients import policy_gradient_class
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.reporting import Reporting, hooks_of
from hf_divguard.hf.rollback import Rollback
from hf_divguard.hf.rollback_in_step import RollbackInStep
from hf_divguard.hf.run_events import RunEvents
from hf_divguard.hf.running_loss import RunningLoss
from hf_divguard.hf.saving import Checkpoints
from hf_divguard.hf.signals import Interruption
from hf_divguard.hf.skipping import NonFiniteUpdates
from hf_divguard.hf.suspects import Suspects

__all__ = ["RunComponents", "saves_checkpoints_itself", "will_save_itself"]


def saves_checkpoints_itself(options: Any, callbacks: Iterable[Any]) -> bool:
    """Return whether checkpoints are saved by us: for an option, or for a callback that has a state."""
    return asks_for_safe_saves(options) or any(map(is_stateful, callbacks))


def will_save_itself(args: Any, callbacks: Iterable[Any]) -> bool:
    """Return whether checkpoints will be saved by us, before there is a run."""
    options = options_of(args)
    return options.divguard_detector != "none" or saves_checkpoints_itself(options, callbacks)


class RunComponents:
    """The components of one ``train()`` call, connected with each other; a context manager.

    Whatever it switches on is switched back on every way out, a failing start included.

    Args:
        host: The host.
        options: The options.
        run_dir: Folder that gets the checkpoints.
        resumed_from: Checkpoint that training resumes from, if any.
        initial_states: State of each stateful callback before its first training.
        locks: The folders that this training holds already, and for how long.
        resumes_newest: Whether it resumes from the newest checkpoint, not from one that was named.
        on_divergence: Gets each event that people should see.
    """

    callbacks: RunCallbacks
    checkpoints: Checkpoints
    evaluations: Evaluations
    rollback: Rollback | None
    updates_in_backward: bool
    """Whether the backward pass of the last micro-batch of a step makes the update, too."""
    comparison: Comparison | None
    events: RunEvents
    """Brings the events of the host to the run."""

    def __init__(
        self,
        host: Host,
        options: Any,
        *,
        run_dir: str,
        resumed_from: str | None,
        initial_states: dict[str, Any],
        locks: FolderLocks | None = None,
        resumes_newest: bool = False,
        on_divergence: Hook | None = None,
    ) -> None:
        self.host = host
        self.options = options
        self.is_training = False
        self._run_dir = run_dir
        self._resumed_from = resumed_from
        self._initial_states = initial_states
        self._locks = locks
        self._resumes_newest = resumes_newest
        self._on_divergence = on_divergence

    def __enter__(self) -> RunComponents:
        self._stack = contextlib.ExitStack()
        try:
            self._start(self._stack)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        """Make the components. Losses reach those that subscribe in the order in which they are made here."""
        host, options, args = self.host, self.options, self.host.args
        self.ranks = Ranks(args.process_index, args.world_size)
        self.updates_in_backward = engine_of(host).updates_in_backward
        self._start_losses(stack)
        is_active = saves_checkpoints_itself(options, self.callbacks.stateful.values())
        self._open_run_folder(stack, is_active)
        self._start_comparison(stack)
        self.reporting = self._make_reporting()
        stack.callback(self.reporting.close)
        if self.detectors and options.divguard_incidents > 0:
            self.reporting.recent.is_on = True
            self.losses.subscribe(self.reporting.recent)
        self.ending = Ending(
            host,
            self.ranks,
            self.checkpoints.ledger,
            self._resumed_from,
            resumes_newest=self._resumes_newest,
            is_active=is_active,
        )
        self.interruption = Interruption(host, self.ranks, signals_of(options.divguard_save_on_signal))
        self.interruption.listen(stack)
        self.suspects = Suspects(host, self.checkpoints, self.evaluations, self.journal, self.detectors)
        self.checkpoints.pending_since = self.suspects.pending_since
        self.rollback = self._make_rollback()
        self.rollback_in_step = RollbackInStep(host, self.ranks, self.rollback)
        if self.rollback is not None:
            self.losses.subscribe(self.rollback)
            self.checkpoints.protected_steps = self.rollback.protected_steps
        host.callbacks.append(self.events)
        stack.callback(lambda: host.callbacks.remove(self.events))
        self.is_training = True
        stack.callback(lambda: setattr(self, "is_training", False))

    def _start_losses(self, stack: contextlib.ExitStack) -> None:
        """Collect what each step shows, for the detectors among the callbacks and for skipped updates."""
        host, options = self.host, self.options
        # Policies are sampled from after each step, which fails with weights that are not finite.
        check_steps = 1 if policy_gradient_class(host.trainer) else options.divguard_check_steps
        self.losses = StepLosses(check_steps, host.args.world_size)
        stack.callback(self.losses.close)
        has_detector = any(isinstance(each, DivergenceDetector) for each in host.callbacks)
        self.skipping = NonFiniteUpdates(
            host,
            self.ranks,
            is_wanted=has_detector and options.divguard_skip_nonfinite,
            max_in_a_row=options.divguard_max_skipped_in_a_row,
        )
        self.callbacks = RunCallbacks(host, stack, self.losses, self.skipping, self._initial_states)
        if self.skipping.is_on:
            self.losses.subscribe(self.skipping)
        self.running_loss = RunningLoss(host, self.ranks)

    def _open_run_folder(self, stack: contextlib.ExitStack, is_active: bool) -> None:
        """Lock the run folder and read what it knows: checkpoints, their metrics, events."""
        host, options = self.host, self.options
        locks = self._locks or stack.enter_context(FolderLocks())
        locks.hold(self._run_dir, self.ranks, create=is_active)
        self.checkpoints = Checkpoints(
            host, options, self.ranks, self._run_dir, self._resumed_from, is_active=is_active
        )
        self.evaluations = Evaluations(host, options, self.ranks, self.checkpoints.ledger)
        ledger = self.checkpoints.ledger
        self.journal = self.skipping.journal = RunJournal(ledger.run_dir, ledger.run_id, self.ranks)

    def _start_comparison(self, stack: contextlib.ExitStack) -> None:
        """Keep weights in memory, and compare them with the present ones, if that is wanted."""
        self.snapshots, self.comparison = make_comparison(
            self.host, self.options, self.ranks, self.journal, list(self.detectors.values())
        )
        stack.callback(self.snapshots.clear)
        if self.comparison is not None:
            self.losses.subscribe(self.comparison)
            stack.callback(self.comparison.forget_batches)

    def _make_reporting(self) -> Reporting:
        return Reporting(
            self.host,
            self.options,
            self.ranks,
            self.journal,
            hooks=hooks_of(self.host.callbacks, self._on_divergence),
            rows=lambda: self.comparison.bad_batches.rows if self.comparison is not None else [],
            run_dir=self.checkpoints.ledger.run_dir,
        )

    def _make_rollback(self) -> Rollback | None:
        detectors = self.detectors
        rolling_back = [each for each in detectors.values() if each.action == "rollback"]
        if not rolling_back:
            return None
        adaptive = [each for each in rolling_back if isinstance(each, AdaptiveDivergenceDetector)]
        return Rollback(
            self.host,
            self.options,
            ledger=self.checkpoints.ledger,
            ranks=self.ranks,
            journal=self.journal,
            leads=self.checkpoints.leads,
            snapshots=self.snapshots,
            comparison=self.comparison,
            detectors=detectors,
            watches_damage=any(each.takes_raw_losses for each in adaptive),
            on_rewind=self._forget_after,
        )

    @property
    def detectors(self) -> dict[str, DivergenceDetector]:
        """The detectors by the names under which their states are kept."""
        named = self.callbacks.stateful.items()
        return {name: each for name, each in named if isinstance(each, DivergenceDetector)}

    def _forget_after(self, target_step: int) -> None:
        """After a rollback, forget what evaluations of the steps after ``target_step`` gave."""
        self.evaluations.forget_after(self.host.state, target_step)
        if self.checkpoints.preserves_best:
            self.checkpoints.point_to_best()
