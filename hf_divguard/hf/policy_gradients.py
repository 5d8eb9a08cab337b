"""Trainers whose loss does not measure progress: policy gradients, such as GRPO."""

from __future__ import annotations

from typing import Any

__all__ = ["policy_gradient_class"]

_NAMES = ("GRPO", "RLOO", "PPO", "OnlineDPO", "Reinforce", "NashMD", "XPO")
"""Parts of the class names of TRL's trainers that sample from the model and learn from a reward."""


def policy_gradient_class(trainer: Any) -> str | None:
    """Return the name of the class that makes ``trainer`` one of policy gradients; ``None`` if it is none.

    There the loss is about 0 at the policy that sampled, may grow with the distance to a
    reference model while the reward rises, and is no measure of progress. Only values that are
    not finite say something.

    Example:
        >>> class MyGRPOTrainer: pass
        >>> policy_gradient_class(MyGRPOTrainer()), policy_gradient_class(object())
        ('MyGRPOTrainer', None)
    """
    names = (each.__name__ for each in type(trainer).__mro__)
    return next((name for name in names if any(part in name for part in _NAMES)), None)
