"""The log key that a detector watches: warns if it cannot come, or does not."""

from __future__ import annotations

import logging
from typing import Any

from hf_divguard.hf.control import is_world_zero
from hf_divguard.hf.options.values import did_you_mean

__all__ = ["WatchedKey"]

logger = logging.getLogger(__name__)

# Rounds of logs (or evaluations) without the watched key after which the user is warned. An evaluation with
# several data sets is one round; the first train log may lack a key that later ones have.
_ROUNDS_BEFORE_MISSING = 3


class WatchedKey:
    """Watches whether one log key comes.

    Args:
        label: Name of the detector, for messages.
        key: The log key.
    """

    def __init__(self, label: str, key: str) -> None:
        self._label = label
        self._key = key
        self.was_seen = False
        self._has_warned = False
        self._rounds: set[int] = set()

    def warn_if_nothing_evaluates(self, args: Any, state: Any) -> None:
        """At the start, warn if the key is one of an evaluation and nothing evaluates."""
        strategy = getattr(args, "eval_strategy", None)
        evaluates = getattr(strategy, "value", strategy) != "no" or getattr(args, "eval_on_save", False)
        if args is None or not self._key.startswith("eval_") or evaluates or not is_world_zero(state):
            return
        logger.warning(
            "%s watches `%s`, but `eval_strategy` is 'no': unless something else evaluates, nothing is guarded. "
            "Set `eval_strategy`, or watch `loss`.",
            self._label,
            self._key,
        )

    def is_missing_in(self, state: Any, values: dict[str, Any]) -> None:
        """Note a log, or an evaluation, without the key; warn after the third."""
        if self.was_seen or self._has_warned:
            return
        step = getattr(state, "global_step", None)
        self._rounds.add(len(self._rounds) if step is None else step)
        if len(self._rounds) >= _ROUNDS_BEFORE_MISSING:
            self._warn(state, values)

    def is_named_otherwise_in(self, state: Any, metrics: dict[str, Any]) -> None:
        """Warn at once where an evaluation has the key with ``eval_`` before it."""
        if (
            not self.was_seen
            and not self._has_warned
            and self._key != "loss"
            and f"eval_{self._key}" in metrics
        ):
            self._has_warned = True
            if is_world_zero(state):
                logger.warning(
                    "%s watches `%s`, which no log holds, but evaluations give `eval_%s`. Set `metric_key` (the flag is "
                    "`divguard_metric_key`) to `eval_%s`.",
                    self._label,
                    *[self._key] * 3,
                )

    def warn_if_it_never_came(self, state: Any) -> None:
        """At the end, warn if the key was missing all the time."""
        if not self.was_seen and self._rounds and not self._has_warned:
            self._warn(state, {})

    def _warn(self, state: Any, values: dict[str, Any]) -> None:
        self._has_warned = True
        if is_world_zero(state):
            there = (
                f" Keys that are there: {sorted(values)}.{did_you_mean(self._key, values)}" if values else ""
            )
            logger.warning(
                "%s watches `%s`, but that key has not come in %d rounds of logs: nothing is being guarded.%s Set "
                "`metric_key` (the flag is `divguard_metric_key`) to one of the logged keys. Those of evaluations begin "
                "with `eval_`.",
                self._label,
                self._key,
                len(self._rounds),
                there,
            )
