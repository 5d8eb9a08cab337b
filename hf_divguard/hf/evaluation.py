"""What evaluations gave: the metric of a step, and the best of them as the host and the ranking see it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import EarlyStoppingCallback

from hf_divguard.core.metrics import with_eval_prefix
from hf_divguard.core.retention import CheckpointRecord, is_better, rank
from hf_divguard.errors import MetricNotFoundError
from hf_divguard.hf.host import Host
from hf_divguard.hf.options.values import did_you_mean
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.ledger import CheckpointLedger

__all__ = ["Evaluations"]

logger = logging.getLogger(__name__)


class Evaluations:
    """The evaluations of one ``train()`` call.

    Args:
        host: The host.
        options: The options.
        ranks: The processes of the run.
        ledger: The checkpoints of the run.
    """

    def __init__(self, host: Host, options: Any, ranks: Ranks, ledger: CheckpointLedger) -> None:
        self._host = host
        self._ranks = ranks
        self._ledger = ledger
        self._best_model_metric = options.best_model_metric
        self._greater_is_better = bool(options.divguard_greater_is_better)
        tracked = host.args.metric_for_best_model
        self._host_key = None if tracked is None else with_eval_prefix(tracked)
        self.metric_key = options.divguard_ranking_key
        self.ranks_checkpoints = bool(options.preserve_best_model)
        self.best_follows_saves = self.ranks_checkpoints or bool(
            options.eval_on_save and self._host_key is not None
        )
        """Whether the host's best metric is set when a checkpoint is saved, not when one is evaluated."""
        self._values_not_finite = 0
        self.is_running = False
        self.ranks_meet_first = False
        """Whether a callback of one rank may have asked for an evaluation."""
        self.metrics: dict[str, float] = {}
        self._step: int | None = None
        self._best_evaluated: float | None = None

    # ---- one evaluation

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the host evaluates, show it the best of all evaluations: early stopping compares with it."""
        if self.ranks_meet_first:
            self._ranks.gather(None)  # all ranks take part, or all end with the same error
        state, best_saved = self._host.state, self._host.state.best_metric
        self.is_running = True
        if self.best_follows_saves:
            state.best_metric = self._best_evaluated
        try:
            yield
        finally:
            self.is_running = False
            state.best_metric = best_saved

    def note(self, step: int, metrics: dict[str, float] | None) -> None:
        """Remember the results of the evaluation at ``step``."""
        self.metrics, self._step = dict(metrics or {}), step

    def has_evaluated(self, step: int) -> bool:
        """Return whether ``step`` was evaluated, in this run or in the one it resumes."""
        return self._step == step

    def metric_of_step(self, step: int) -> float | None:
        """Return the ranking metric that was evaluated at exactly ``step``, if it was."""
        if self._step != step or self.metric_key not in self.metrics:
            return None
        return _metric_value(self.metric_key, self.metrics)

    # ---- the best one

    def host_best_is_due(self, step: int) -> bool:
        """Return whether the host has to record its own best metric when ``step`` is saved."""
        return self.best_follows_saves and not self.ranks_checkpoints and self.has_evaluated(step)

    def is_new_best(self, metrics: dict[str, float]) -> bool | None:
        """Return whether an evaluation is better than every checkpoint; ``None`` leaves it to the host.

        Raises:
            MetricNotFoundError: If the evaluation did not produce the ranking metric.
        """
        if self.best_follows_saves:
            self._note_best(metrics)
        if self.ranks_checkpoints:
            return self._ranks.run_on_main(lambda: self._beats_all(metrics))
        if self.best_follows_saves and self._host.args.save_strategy != "best":
            return False
        return None

    def _beats_all(self, metrics: dict[str, float]) -> bool:
        if self.metric_key not in metrics:
            raise _metric_not_found(self._best_model_metric, self.metric_key, metrics)
        value = _metric_value(self.metric_key, metrics)
        self._values_not_finite = 0 if math.isfinite(value) else self._values_not_finite + 1
        if self._values_not_finite == 2:
            logger.warning(
                "`%s` = %s at two evaluations in a row. It ranks checkpoints, and a value that is not finite ranks last, "
                "so none is better than another as long as it stays so. Look at the evaluation, or set another "
                "`best_model_metric`.",
                self.metric_key,
                value,
            )
        return self._ledger.would_be_best(value, self._greater_is_better)

    def _note_best(self, metrics: dict[str, float]) -> None:
        """Remember the best of all evaluations: the host's patience is measured against it, saved or not."""
        if self._host_key is None or metrics.get(self._host_key) is None:
            return
        value = _metric_value(self._host_key, metrics)
        greater = bool(self._host.args.greater_is_better)
        if is_better(value, self._best_evaluated, greater_is_better=greater):
            self._best_evaluated = value
        elif self._best_evaluated is None:  # as the host has it after an evaluation that was not finite
            self._best_evaluated = -math.inf if greater else math.inf

    # ---- after a resume or a rollback

    def recall(self, state: Any) -> None:
        """Take the results of the step that training resumes at, and the best so far, from its log."""
        for entry in _entries(state):
            metrics = {key: value for key, value in entry.items() if key.startswith("eval_")}
            if metrics and entry.get("step") == state.global_step:
                self.note(state.global_step, {**self.metrics, **metrics})
        self._recall_best_evaluated(state, state.global_step)

    def forget_after(self, state: Any, target_step: int) -> None:
        """After a rollback, forget what evaluations of the steps after ``target_step`` gave."""
        self.metrics, self._step = {}, None
        self._recall_best_evaluated(state, target_step)
        for callback in self._host.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = 0
        if (state.best_global_step or math.inf) > target_step:
            self.recall_host_best(state, target_step)

    def _recall_best_evaluated(self, state: Any, last_step: int) -> None:
        self._best_evaluated = None
        if self.best_follows_saves:
            for entry in _entries(state):
                if 0 < entry["step"] <= last_step:
                    self._note_best(entry)

    def recall_host_best(self, state: Any, last_step: float) -> None:
        """Take the host's best metric from the evaluations up to ``last_step`` whose checkpoints exist and count.

        Where the host names no step for it, as without saves, all of them count. Where checkpoints
        are ranked by us, or nothing was evaluated, there is nothing to do.
        """
        if self.ranks_checkpoints or self._host_key is None or state.best_metric is None:
            return
        names_step = state.best_global_step is not None
        key = str(self._host_key)
        present = set(self._ledger.usable_steps())
        logged = [
            CheckpointRecord(entry["step"], entry["step"], float(entry[key]))
            for entry in _entries(state)
            if key in entry
            and math.isfinite(entry[key])
            and entry["step"] <= last_step
            and (entry["step"] in present or not names_step)
        ]
        best = next(iter(rank(logged, greater_is_better=bool(self._host.args.greater_is_better))), None)
        state.best_metric = best.metric if best else None
        if names_step:
            state.best_global_step = best.step if best else None
            state.best_model_checkpoint = self._ledger.path(best.step) if best else None


def _entries(state: Any) -> list[dict[str, Any]]:
    """Return the log entries of ``state`` that name their step; a file may hold others."""
    return [
        entry
        for entry in state.log_history
        if isinstance(entry, dict) and isinstance(entry.get("step"), (int, float))
    ]


def _metric_not_found(asked: str, key: str, metrics: Mapping[str, Any]) -> MetricNotFoundError:
    """Return the error for an evaluation without the ranking metric.

    Args:
        asked: ``best_model_metric`` as it was given.
        key: Its key in the results.
        metrics: The results.
    """
    there = sorted(name for name in metrics if name.startswith("eval_"))
    return MetricNotFoundError(
        f"`best_model_metric={asked!r}` ranks checkpoints, but the evaluation produced no `{key}`. It produced "
        f"{there}.{did_you_mean(key, there)} Set `best_model_metric` to one of them, or let `compute_metrics` return it."
    )


def _metric_value(key: str, metrics: Mapping[str, Any]) -> float:
    """Return the ranking metric of an evaluation.

    Raises:
        TypeError: If it is not a number.
    """
    try:
        return float(metrics[key])
    except (TypeError, ValueError):
        raise TypeError(
            f"The metric that ranks checkpoints must be a number, but `{key}` is {metrics[key]!r}. Let `compute_metrics` "
            "return a number, or set another `best_model_metric`."
        ) from None
