"""What an evaluation has led to, made the same on every rank before anything follows from it."""

from __future__ import annotations

import logging
from typing import Any

from hf_divguard.hf.ranks import Ranks

__all__ = ["agree_on_what_follows"]

logger = logging.getLogger(__name__)

_OF_STATE = ("divguard_finding", "divguard_stop_reason", "divguard_rollback_request")


def agree_on_what_follows(ranks: Ranks, state: Any, control: Any) -> None:
    """Let a stop, an abort, a save or a rollback that one rank asks for take place on all.

    ``compute_metrics`` may give each rank another value. A rank that stopped or saved alone
    would leave the others waiting. Called by all ranks.

    Args:
        ranks: The processes of the run.
        state: The ``TrainerState``.
        control: The ``TrainerControl``.
    """
    if ranks.world_size == 1:
        return
    own = {name: getattr(state, name, None) for name in _OF_STATE}
    wishes = {
        "aborts": bool(getattr(state, "divguard_aborted", False)),
        "stops": bool(control.should_training_stop),
        "saves": bool(control.should_save),
    }
    told = ranks.gather({**own, **wishes})
    told.sort(key=lambda entry: not entry["aborts"])  # the reason of an abort goes before that of a stop
    for name in _OF_STATE:
        value = next((entry[name] for entry in told if entry[name] is not None), None)
        if value is not None:
            setattr(state, name, value)
    reason = getattr(state, "divguard_stop_reason", None)
    if reason is not None and own["divguard_stop_reason"] is None and ranks.rank == 0:
        logger.warning("Another rank has asked for the end of training. %s", reason)
    control.should_training_stop = any(entry["stops"] for entry in told)
    control.should_save = any(entry["saves"] for entry in told)
    if any(entry["aborts"] for entry in told):
        state.divguard_aborted = True
        if hasattr(control, "should_abort_without_save"):
            control.should_abort_without_save = True
    if (
        getattr(state, "divguard_aborted", False)
        or getattr(state, "divguard_rollback_request", None) is not None
    ):
        control.should_save = False
