"""Checks of the options: single values, and what they need of each other and of the data."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Mapping
from typing import Any, get_args

__all__ = [
    "check_evaluation_data",
    "check_ranking_has_evaluations",
    "check_signals",
    "check_something_is_saved",
    "json_object",
    "optional_bool",
    "require_bool",
    "require_choice",
    "require_whole",
    "signals_of",
]

logger = logging.getLogger(__name__)

_TRUE = {"true", "yes", "1", "t", "y"}
_FALSE = {"false", "no", "0", "f", "n"}


def optional_bool(name: str, value: Any) -> bool | None:
    """Return true, false or none as written on a command line or in a file."""
    word = str(value).strip().lower()
    if value is None or word in {"none", "null", ""}:
        return None
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"`{name}` must be true, false or none, got {value!r}.")


def require_bool(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, got {value!r} of type {type(value).__name__}.")


def require_whole(name: str, value: Any, unit: str, *, at_least: int, instead: str = "") -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number, large enough."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(
            f"`{name}` must be a whole number of {unit}, at least {at_least}, got {value!r}.{instead}"
        )


def json_object(name: str, value: Any) -> dict[str, Any] | None:
    """Return settings that were given as a mapping or, on a command line, as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(
                f"`{name}` must be a JSON object like '{{\"threshold\": 1.0}}', got {value!r}: {error}."
            ) from None
    if value is None or (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
        return value
    raise ValueError(f"`{name}` must be a JSON object or a dict of settings, got {value!r}.")


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is one of a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(f"`{name}` must be one of {list(get_args(choices))}, got {value!r}.")


_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")


def signals_of(value: str) -> tuple[str, ...]:
    """Return the names in a list of signals.

    Example:
        >>> signals_of("SIGTERM, sigusr1"), signals_of("none")
        (('SIGTERM', 'SIGUSR1'), ())
    """
    words = [word.strip().upper() for word in value.split(",") if word.strip()]
    return () if words == ["NONE"] else tuple(dict.fromkeys(words))


def check_signals(args: Any, name: str) -> None:
    """Raise ``ValueError`` unless an option lists signals that a run can end on."""
    value = getattr(args, name)
    usable = [each for each in _SIGNALS if hasattr(signal, each)]
    names = signals_of(value) if isinstance(value, str) else None
    if names is None or (not names and value.strip().lower() != "none") or not set(names) <= set(usable):
        raise ValueError(
            f"`{name}` must be none, or one or more of {', '.join(usable)} with commas between them, got {value!r}."
        )
    if "SIGTERM" in names and getattr(args, "enable_jit_checkpoint", False):
        raise ValueError(
            f"`{name}={value}` and `enable_jit_checkpoint=True` both save on SIGTERM. Set one of them; `{name}` saves "
            "at the end of the step, from where a resumed run goes on as one that was not cut."
        )


# ---- options and data together


def check_something_is_saved(args: Any) -> None:
    """Raise ``ValueError`` if ``save_strategy=\"best\"`` has no evaluation to go by."""
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ValueError(
            "`save_strategy` is 'best', which saves when an evaluation is better than all before, but "
            "`eval_strategy` is 'no': nothing would ever be saved. Set `eval_strategy` to 'steps' or 'epoch'."
        )


def check_ranking_has_evaluations(args: Any) -> None:
    """Raise, or warn, if checkpoints are ranked without evaluations at the steps of saves."""
    if args.eval_on_save:
        return
    eval_strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    save_strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if eval_strategy == "no":
        raise ValueError(
            "`preserve_best_model=True` ranks checkpoints by evaluations, but `eval_strategy` is 'no' and "
            "`eval_on_save` is off. Set `eval_on_save=True` to evaluate before every save."
        )
    apart = save_strategy in ("steps", "epoch") and save_strategy != eval_strategy
    if save_strategy == eval_strategy == "steps" and args.save_steps >= 1 and args.eval_steps >= 1:
        apart = args.save_steps % args.eval_steps != 0
    if apart:
        logger.warning(
            "Checkpoints are ranked only where an evaluation falls on the very step of a save; with "
            "eval_strategy=%s (eval_steps=%s) and save_strategy=%s (save_steps=%s) some saves have none and can "
            "never be best. Set `eval_on_save=True` to evaluate before every save.",
            eval_strategy,
            args.eval_steps,
            save_strategy,
            args.save_steps,
        )


def check_evaluation_data(options: Any, eval_dataset: Any) -> None:
    """Raise ``ValueError`` if an option needs an evaluation data set, or a metric, that cannot come."""
    if options.eval_on_save and eval_dataset is None:
        raise ValueError(
            "`eval_on_save=True` evaluates before every save, but there is no `eval_dataset`. Pass one to the "
            "trainer, or set `eval_on_save=False`."
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
