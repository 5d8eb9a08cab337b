"""Evaluates one batch before the first step, to see whether evaluations produce the metric that ranks."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from hf_divguard.errors import MetricNotFoundError
from hf_divguard.hf.argument_checks import evaluates_as_stock, is_in_every_evaluation
from hf_divguard.hf.options.values import did_you_mean
from hf_divguard.hf.ranks import Ranks

__all__ = ["check_ranking_metric", "metric_not_found", "metric_value"]

logger = logging.getLogger(__name__)


def metric_not_found(asked: str, key: str, metrics: Mapping[str, Any]) -> MetricNotFoundError:
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


def metric_value(key: str, metrics: Mapping[str, Any]) -> float:
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


def check_ranking_metric(trainer: Any, options: Any, ranks: Ranks) -> None:
    """Before the first step, evaluate one batch and see whether the ranking metric is there.

    Nothing of it stays: no log, no event for callbacks, no random number. ``compute_metrics``
    is called as a copy; only a function that counts outside of itself sees one more call.

    There is no trial where an evaluation has shown the metric or is about to take place, and
    where metrics may come from elsewhere. If it fails, as a metric may with few rows, nothing
    is concluded. Called by all ranks.

    Raises:
        MetricNotFoundError: On every rank, if the metric is not among the results.
        TypeError: On every rank, if it is not a number.
    """
    key = options.divguard_ranking_key
    if not _is_in_question(trainer, options, key):
        return
    metrics = _metrics_of_one_batch(trainer, key)
    metrics = ranks.broadcast(metrics)
    if metrics is not None and key not in metrics:
        raise metric_not_found(options.best_model_metric, key, metrics)
    if metrics is not None:
        metric_value(key, metrics)


def _is_in_question(trainer: Any, options: Any, key: str) -> bool:
    args = trainer.args
    return bool(
        options.preserve_best_model
        and trainer.compute_metrics is not None
        and not is_in_every_evaluation(key)
        and evaluates_as_stock(trainer)
        and not args.eval_on_start
        and not getattr(args, "use_legacy_prediction_loop", False)  # ends with 4.x support
        and not any(isinstance(entry, dict) and key in entry for entry in trainer.state.log_history)
    )


def _metrics_of_one_batch(trainer: Any, key: str) -> dict[str, float] | None:
    """Return what an evaluation of one batch gives; ``None`` if it cannot be known."""
    rows, prefix = trainer.eval_dataset, "eval"
    if isinstance(rows, Mapping):
        name = next((each for each in rows if key.startswith(f"eval_{each}_")), None)
        rows, prefix = rows.get(name), f"eval_{name}"
    if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
        return None  # a stream: reading from it may change what comes next
    n_rows = min(len(rows), trainer.args.eval_batch_size * trainer.args.world_size)
    batch = rows.select(range(n_rows)) if hasattr(rows, "select") else Subset(rows, range(n_rows))
    model, was_training = trainer.model, trainer.model.training
    try:
        with _nothing_stays(trainer), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metrics, which few rows may leave undefined
            loader = trainer.get_eval_dataloader(batch)
            output = trainer.evaluation_loop(loader, description="Trial evaluation", metric_key_prefix=prefix)
    except Exception as error:
        logger.info(
            "Whether an evaluation produces `%s` is not known before the first one: one batch could not be evaluated "
            "(%s: %s).",
            key,
            type(error).__name__,
            error,
        )
        return None
    finally:
        model.train(was_training)
    return dict(output.metrics)


@contextlib.contextmanager
def _nothing_stays(trainer: Any) -> Iterator[None]:
    """Give callbacks, settings, metric and random states back as they were."""
    args, handler = trainer.args, trainer.callback_handler
    # No workers: the host would keep persistent ones, with these rows, for the evaluations to come.
    settings = {
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "dataloader_prefetch_factor": None,
    }
    before = {name: getattr(args, name) for name in settings}
    callbacks, compute_metrics, loader = handler.callbacks, trainer.compute_metrics, handler.eval_dataloader
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        trainer.compute_metrics = copy.deepcopy(compute_metrics)
        handler.callbacks = []
        for name, value in settings.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
        handler.callbacks, trainer.compute_metrics, handler.eval_dataloader = (
            callbacks,
            compute_metrics,
            loader,
        )
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
