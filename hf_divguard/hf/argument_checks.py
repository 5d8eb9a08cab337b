"""Checks of options together: with each other, and with the data and metrics of a trainer."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Collection, Mapping
from typing import Any

from hf_divguard.core.metrics import HIGHER_IS_BETTER, LOWER_IS_BETTER, greater_is_better, with_eval_prefix
from hf_divguard.hf.options.values import did_you_mean
from hf_divguard.hf.returned_names import returned_names

__all__ = [
    "check_arguments_can_be_saved",
    "check_combinations",
    "check_evaluation_data",
    "check_ranking_has_evaluations",
    "check_ranking_metric_can_come",
    "check_something_is_saved",
    "evaluates_as_stock",
    "is_in_every_evaluation",
    "warn_of_options_without_effect",
]

logger = logging.getLogger(__name__)

_DEPENDS_ON_USE = {"distance", "divergence", "entropy", "grad_norm", "kl", "kl_div"}
"""Known names whose direction is another one in some trainings, such as the entropy of a policy."""

_METRICS_OF_EVERY_EVALUATION = re.compile(r"eval_(.*_)?(loss|runtime|samples_per_second|steps_per_second)")


def _warn(sentence: str, *values: Any) -> None:
    # Arguments are made by every process, before they know of each other.
    if os.environ.get("RANK", "0") == "0":
        logger.warning(sentence, *values)


def _strategy(value: Any) -> str:
    return str(getattr(value, "value", value))


# ---- options with each other


def check_combinations(args: Any) -> None:
    """Raise ``ValueError`` for options that contradict each other or what is known."""
    if args.divguard_save_mode == "off":
        for name in ("divguard_checksums", "divguard_fsync"):
            if getattr(args, name):
                raise ValueError(
                    f"`{name}=True` is for checkpoints that hf_divguard completes, but `divguard_save_mode` is 'off', "
                    "which leaves saving to the stock Trainer. Set `divguard_save_mode='auto'`, or leave "
                    f"`{name}` out."
                )
    _check_direction(args)


def _check_direction(args: Any) -> None:
    """Raise, or warn where a name is not certain, if the ranking metric is to be the wrong way round."""
    name, asked = "best_model_greater_is_better", args.best_model_greater_is_better
    if asked is None and args.preserve_best_model:
        name, asked = "greater_is_better", getattr(args, "greater_is_better", None)
    metric = args.best_model_metric.removeprefix("eval_")
    usual = greater_is_better(metric)
    if asked is None or usual is None or bool(asked) == usual:
        return
    better, kept = ("higher", "lowest") if usual else ("lower", "highest")
    if metric.lower() in (HIGHER_IS_BETTER | LOWER_IS_BETTER) - _DEPENDS_ON_USE:
        raise ValueError(
            f"`{name}={bool(asked)}` contradicts `best_model_metric={args.best_model_metric!r}`: {metric} is better "
            f"when {better}, so the worst checkpoints would be kept. Leave `{name}` out. If your metric is of another "
            "kind, let `compute_metrics` return it under another name."
        )
    _warn(
        "`%s=%s`: a metric with a name like `best_model_metric=%r` is usually better when %s. The checkpoints with the "
        "%s values are kept. Leave `%s` out if that is not meant.",
        name,
        bool(asked),
        args.best_model_metric,
        better,
        kept,
        name,
    )


def warn_of_options_without_effect(args: Any, changed: Mapping[str, Any]) -> None:
    """Warn of options that have no effect as the others are, whatever the trainer and its callbacks.

    Args:
        args: The arguments, complete.
        changed: The options that are not at their defaults.
    """
    if "preserve_n_best" in changed and not args.preserve_best_model:
        _warn(
            "`preserve_n_best=%s` has no effect: no best checkpoint is kept as long as `preserve_best_model` is off. "
            "Set `preserve_best_model=True`.",
            args.preserve_n_best,
        )
    evaluates = args.eval_on_save or _strategy(args.eval_strategy) != "no"
    ranking = [name for name in ("best_model_metric", "best_model_greater_is_better") if name in changed]
    if ranking and not args.preserve_best_model and not evaluates:
        _warn(
            "%s ranks checkpoints, but there is nothing to rank by: `preserve_best_model` is off, `eval_strategy` is "
            "'no' and `eval_on_save` is off. Set `preserve_best_model=True` and `eval_on_save=True`.",
            " and ".join(f"`{name}`" for name in ranking),
        )
    if "divguard_action" in changed and args.divguard_detector == "none":
        _warn(
            "`divguard_action=%r` has no detector to act for: `divguard_detector` is 'none', and detectors that are "
            "passed as callbacks have an `action` of their own. Set `divguard_detector`, for example to 'adaptive'.",
            args.divguard_action,
        )


def check_something_is_saved(args: Any) -> None:
    """Raise ``ValueError`` if ``save_strategy=\"best\"`` has no evaluation to go by."""
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ValueError(
            "`save_strategy` is 'best', which saves when an evaluation is better than all before, but "
            "`eval_strategy` is 'no': nothing would ever be saved. Set `eval_strategy` to 'steps' or 'epoch'."
        )
    if _strategy(args.save_strategy) == "no":
        _warn(
            "`eval_on_save=True` evaluates before every save, but `save_strategy` is 'no': nothing is saved, so nothing "
            "is evaluated. Set `save_strategy` to 'steps' or 'epoch', or use `eval_strategy`."
        )


def check_ranking_has_evaluations(args: Any) -> None:
    """Raise, or warn, if checkpoints are ranked without evaluations at the steps of saves."""
    eval_strategy, save_strategy = _strategy(args.eval_strategy), _strategy(args.save_strategy)
    if save_strategy == "no":
        _warn(
            "`preserve_best_model=True` keeps the best checkpoints, but `save_strategy` is 'no': there is none to keep. "
            "Set `save_strategy` to 'steps' or 'epoch'."
        )
    if args.eval_on_save:
        return
    if eval_strategy == "no":
        raise ValueError(
            "`preserve_best_model=True` ranks checkpoints by evaluations, but `eval_strategy` is 'no' and "
            "`eval_on_save` is off. Set `eval_on_save=True` to evaluate before every save."
        )
    apart = save_strategy in ("steps", "epoch") and save_strategy != eval_strategy
    if save_strategy == eval_strategy == "steps" and args.save_steps >= 1 and args.eval_steps >= 1:
        apart = args.save_steps % args.eval_steps != 0
    if apart:
        _warn(
            "Checkpoints are ranked only where an evaluation falls on the very step of a save; with "
            "eval_strategy=%s (eval_steps=%s) and save_strategy=%s (save_steps=%s) some saves have none and can "
            "never be best. Set `eval_on_save=True` to evaluate before every save.",
            eval_strategy,
            args.eval_steps,
            save_strategy,
            args.save_steps,
        )


# ---- options and the trainer


def check_evaluation_data(options: Any, eval_dataset: Any) -> None:
    """Raise ``ValueError`` if an option needs an evaluation data set, or a metric, that cannot come."""
    if options.eval_on_save and eval_dataset is None:
        raise ValueError(
            "`eval_on_save=True` evaluates before every save, but there is no `eval_dataset`. Pass one to the "
            "trainer, or set `eval_on_save=False`."
        )
    if options.divguard_eval_arbiter and eval_dataset is None:
        raise ValueError(
            "`divguard_eval_arbiter=True` lets the evaluation set decide on data that stay bad, but there is no "
            "`eval_dataset`. Pass one to the trainer, or set `divguard_eval_arbiter=False`."
        )
    if options.eval_on_save or options.preserve_best_model or options.divguard_eval_arbiter:
        sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        empty = next(
            (name for name, rows in sets.items() if hasattr(rows, "__len__") and len(rows) == 0), None
        )
        if empty is not None:
            raise ValueError(
                f"`eval_dataset`{f' {empty!r}' if empty else ''} must have rows for weights to be evaluated, but it "
                "is empty. Look at the split or the filter that made it."
            )
    if options.preserve_best_model and isinstance(eval_dataset, Mapping):
        metric = options.divguard_ranking_key.removeprefix("eval_")
        if not any(metric.startswith(f"{name}_") for name in eval_dataset):
            likely = [f"{name}_{metric}" for name in eval_dataset]
            raise ValueError(
                f"`best_model_metric={options.best_model_metric!r}` names no metric of the evaluation sets "
                f"{list(eval_dataset)}: with several sets each metric carries the name of its set. Set it to one "
                f"of {likely}."
            )


def is_in_every_evaluation(key: str) -> bool:
    """Return whether ``key`` is a metric that an evaluation has without ``compute_metrics``, such as ``eval_loss``."""
    return _METRICS_OF_EVERY_EVALUATION.fullmatch(key) is not None


def evaluates_as_stock(trainer: Any) -> bool:
    """Return whether all metrics of an evaluation come from ``compute_metrics``.

    A class of another library may add some by its own evaluation, and a callback by its own
    ``on_evaluate``.
    """
    names = ("evaluate", "_evaluate", "evaluation_loop")
    own = [each for each in type(trainer).__mro__ if any(name in vars(each) for name in names)]
    modules = [each.__module__ for each in own]
    modules += [type(each).on_evaluate.__module__ for each in trainer.callback_handler.callbacks]
    return all(module.split(".")[0] in ("transformers", "hf_divguard") for module in modules)


def check_ranking_metric_can_come(options: Any, trainer: Any) -> None:
    """Raise ``ValueError`` if checkpoints are ranked, or the best is tracked, by a metric that no evaluation produces.

    That is certain where there is no ``compute_metrics``, or where its source shows all names that it returns, and
    nothing else adds metrics. Else the first evaluation shows it.
    """
    args = trainer.args
    name = "best_model_metric" if options.preserve_best_model else "metric_for_best_model"
    asked = getattr(options if options.preserve_best_model else args, name, None)
    if asked is None or not (options.preserve_best_model or options.eval_on_save):
        return
    key, compute = with_eval_prefix(asked), getattr(trainer, "compute_metrics", None)
    returned = None if compute is None else returned_names(compute)
    known = _keys_of(returned or (), getattr(trainer, "eval_dataset", None))
    is_open = compute is not None and returned is None
    if is_open or key in known or is_in_every_evaluation(key) or not evaluates_as_stock(trainer):
        return
    there = "the trainer has no `compute_metrics`, so there is only `eval_loss`"
    if returned is not None:
        there = f"`compute_metrics` returns {sorted(returned)}"
    raise ValueError(
        f"`{name}={asked!r}` {'ranks checkpoints' if options.preserve_best_model else 'is to select the best one'}, but "
        f"no evaluation produces `{key}`: {there}.{did_you_mean(key, {*known, 'eval_loss'})} Pass a `compute_metrics` "
        f"that returns {key.removeprefix('eval_')!r}, or set `{name}={sorted(returned or {'loss'})[0]!r}`."
    )


def _keys_of(names: Collection[str], eval_dataset: Any) -> set[str]:
    """Return the keys under which an evaluation, or those of several sets, has metrics with such names."""
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else ()
    prefixes = [f"eval_{each}" for each in sets] or ["eval"]
    return {
        name if name.startswith(f"{prefix}_") else f"{prefix}_{name}" for prefix in prefixes for name in names
    }


def check_arguments_can_be_saved(args: Any) -> None:
    """Raise ``TypeError`` if the class of the arguments cannot be stored, which every checkpoint does."""
    if _strategy(args.save_strategy) == "no":
        return
    try:
        pickle.dumps(type(args))
    except (pickle.PicklingError, AttributeError) as error:
        raise TypeError(
            f"The class of the arguments must be importable by its name, since each checkpoint stores it in "
            f"training_args.bin, but `{type(args).__qualname__}` is not: {error}. Define it at the top of a module, not "
            "inside a function."
        ) from error
