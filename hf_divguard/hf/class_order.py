"""Refuses classes that have the mixin for trainers where it guards nothing."""

from __future__ import annotations

from transformers import Trainer, TrainingArguments

__all__ = ["check_order"]


def check_order(cls: type, mixin: type) -> None:
    """Raise where ``mixin`` stands on the right of the trainer that ``cls`` extends, or ``cls`` is no trainer.

    Raises:
        TypeError: In these cases.
    """
    order = cls.__mro__
    if issubclass(cls, TrainingArguments):
        raise TypeError(
            f"`DivGuardMixin` extends a Trainer class, but `{cls.__name__}` is a class of training arguments. Use "
            "`DivGuardArgumentsMixin` for it."
        )
    if Trainer in order and order.index(Trainer) < order.index(mixin):
        raise TypeError(
            f"`DivGuardMixin` must stand left of the Trainer class it extends, but `{cls.__name__}` has it on the "
            "right, where it guards nothing. Swap the two."
        )
