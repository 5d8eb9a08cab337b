"""What is checked at the start of a training, when all callbacks are known: options without effect, and advice."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import fields
from itertools import combinations
from typing import Any

from hf_divguard.hf.arguments import changed_options
from hf_divguard.hf.control import saves_checkpoints
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.hf.options.rollback import RollbackOptions

__all__ = ["warn_at_start"]

logger = logging.getLogger(__name__)

_LATE = 0.25
"""Share of a run after which the first state to roll back to comes late."""


def warn_at_start(
    host: Any, options: Any, detectors: Iterable[DivergenceDetector], *, is_resumed: bool
) -> None:
    """Warn of options that have no effect with these detectors, and of what makes a rollback fail.

    Args:
        host: The host.
        options: The options.
        detectors: The detectors of the run.
        is_resumed: Whether training resumes from a checkpoint.
    """
    if host.args.process_index != 0:
        return
    changed = changed_options(host.args)
    detectors = list(detectors)
    _warn_of_doubles(detectors)
    if not detectors and "divguard_check_steps" in changed:
        logger.warning(
            "`divguard_check_steps=%s` has no effect: there is no detector that looks at losses. Set "
            "`divguard_detector`, for example to 'adaptive'.",
            options.divguard_check_steps,
        )
    acts = any(each.action != "warn" for each in detectors)
    if options.divguard_eval_arbiter and not (acts and options.divguard_compare == "auto"):
        logger.warning(
            "`divguard_eval_arbiter` has no effect: %s. Set `divguard_action` to 'rollback' or 'stop', with a "
            "`divguard_detector` and `divguard_compare='auto'`.",
            "no detector acts" if not acts else "`divguard_compare` is 'off', so no weights are kept",
        )
    if any(each.action == "rollback" for each in detectors):
        _advise_rollback(host, options, is_resumed=is_resumed)
        return
    idle = [option.name for option in fields(RollbackOptions) if option.name in changed]
    if idle:
        logger.warning(
            "%s %s no effect: no detector rolls back. Set `divguard_action='rollback'`%s.",
            ", ".join(f"`{name}`" for name in idle),
            "has" if len(idle) == 1 else "have",
            " and `divguard_detector`" if options.divguard_detector == "none" else "",
        )


def _warn_of_doubles(detectors: list[DivergenceDetector]) -> None:
    for first, second in combinations(detectors, 2):
        is_same = type(first) is type(second) and type(first.rule) is type(second.rule)
        if is_same and first.metric_key == second.metric_key and not (first.name or second.name):
            actions = sorted({first.action, second.action})
            logger.warning(
                "Two detectors of the class %s watch `%s` (action %s), so one of them may be there by mistake, as when "
                "`divguard_detector` is set and a detector is passed as a callback. Leave one out; if both are "
                "meant, give each a `name`.",
                type(first).__name__,
                first.metric_key,
                " and ".join(map(repr, actions)),
            )


def _advise_rollback(host: Any, options: Any, *, is_resumed: bool) -> None:
    args = host.args
    if options.divguard_snapshot_steps > 0 or not saves_checkpoints(args):
        return  # states in memory are there from the start; without saves the rollback warns by itself
    if args.save_total_limit == 1 and not options.preserve_best_model:
        logger.warning(
            "A rollback needs a checkpoint from before the fault, but `save_total_limit=1` keeps the newest only, "
            "which may be from after it. Set `save_total_limit` to 2 or more, or keep states in memory with "
            "`divguard_snapshot_steps`."
        )
    first, end = _first_save(args, host.state), host.state.max_steps
    if first is None or is_resumed or not first > end * _LATE:
        return
    logger.warning(
        "A rollback needs a checkpoint from before the fault, but the first is saved at step %d of %d: what is found "
        "until then ends the run with an error. Set a smaller `save_steps`, or keep states in memory with "
        "`divguard_snapshot_steps`.",
        min(first, end),
        end,
    )


def _first_save(args: Any, state: Any) -> int | None:
    """Return the step of the first save by ``save_strategy``; ``None`` where it is not known."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "steps":
        return math.ceil(state.save_steps if state.save_steps >= 1 else state.save_steps * state.max_steps)
    if strategy == "epoch" and state.num_train_epochs:
        return math.ceil(state.max_steps / state.num_train_epochs)
    return None
