"""Warns when the reward of reinforcement learning collapses or the KL explodes. It never ends a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from hf_divguard.core.detection.collapse import KlExplosion, LogRule, RewardCollapse
from hf_divguard.core.state import StateError
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.policy_gradients import policy_gradient_class

__all__ = ["PolicyWatch", "make_policy_watch"]

logger = logging.getLogger(__name__)

_REWARDS = ("reward", "objective/rlhf_reward", "objective/scores")
_KLS = ("kl", "objective/kl")
"""Log keys of TRL's trainers; the first one that a log has is watched."""


class PolicyWatch(TrainerCallback):
    """Watches reward and KL as TRL's trainers log them, and warns of a collapse or an explosion.

    Each warning is an event, as that of a detector. It is given once until the values are back,
    and nothing follows from it: no stop, no rollback, no mark on a checkpoint.
    """

    def __init__(self) -> None:
        self._rules: dict[str, LogRule] = {"reward": RewardCollapse(), "kl": KlExplosion()}
        self._reported: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start clean; a resumed run gives the memory back after it."""
        self._reported.clear()
        for rule in self._rules.values():
            rule.reset()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Look at the reward and the KL of a log."""
        for name, keys in (("reward", _REWARDS), ("kl", _KLS)):
            key = next((each for each in keys if each in (logs or {})), None)
            value = None if key is None else _number((logs or {})[key])
            if key is not None and value is not None:
                self._observe(name, key, value, state)

    def _observe(self, name: str, key: str, value: float, state: Any) -> None:
        rule = self._rules[name]
        rule.metric_key = key
        finding = rule.observe(state.global_step, value)
        if finding is None:
            self._reported.discard(name)
            return
        if name in self._reported:
            return
        self._reported.add(name)
        if state.is_world_process_zero:
            logger.warning("%s Training goes on.", finding.message)
        outcome_of(state).record(finding, "warn")

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen of reward and KL."""
        return {name: rule.state_dict() for name, rule in self._rules.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Raises:
            StateError: If a part is missing or of another type.
        """
        for name, rule in self._rules.items():
            part = state_dict.get(name)
            if not isinstance(part, dict):
                raise StateError(f"`{name}` in the state of PolicyWatch must be a mapping, got {part!r}.")
            rule.load_state_dict(part)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def make_policy_watch(options: Any, trainer: Any) -> PolicyWatch | None:
    """Return what watches ``trainer``, ``None`` without a detector or if it learns from no reward."""
    if options.divguard_detector == "none" or policy_gradient_class(trainer) is None:
        return None
    return PolicyWatch()
