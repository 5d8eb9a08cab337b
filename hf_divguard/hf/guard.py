"""``guard``: the guarded form of any class of trainers or of training arguments, in one line."""

from __future__ import annotations

import copyreg
import inspect
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import Trainer, TrainingArguments

from hf_divguard.hf.arguments import DivGuardArgumentsMixin, DivGuardTrainingArguments
from hf_divguard.hf.trainer import DivGuardMixin, DivGuardTrainer

__all__ = ["guard"]

C = TypeVar("C", bound=type)

_guarded: dict[type, type] = {Trainer: DivGuardTrainer, TrainingArguments: DivGuardTrainingArguments}
_metaclasses: dict[type, type] = {}


def guard(cls: C) -> C:
    """Return the class ``cls`` with the guards of hf_divguard.

    For a class of trainers that is ``DivGuardMixin`` left of it, for a class of training
    arguments ``DivGuardArgumentsMixin``, made a dataclass. The same class is returned at
    every call. It can be pickled, as its objects can, where ``cls`` can, and a class of
    your own can extend it.

    Args:
        cls: A subclass of ``transformers.Trainer`` or of ``transformers.TrainingArguments``,
            from a library or of your own. One that is guarded already is returned as it is.

    Raises:
        TypeError: For anything else, and for a trainer whose own training loop has no place
            for the guards.

    Example:
        >>> from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
        >>> guard(Seq2SeqTrainer).__name__, guard(Seq2SeqTrainer) is guard(guard(Seq2SeqTrainer))
        ('GuardedSeq2SeqTrainer', True)
        >>> args = guard(Seq2SeqTrainingArguments)("out", eval_on_save=True, generation_max_length=8, use_cpu=True)
        >>> args.eval_on_save, args.generation_max_length
        (True, 8)
    """
    if not isinstance(cls, type):
        raise TypeError(_not_a_class(cls))
    if issubclass(cls, (DivGuardMixin, DivGuardArgumentsMixin)) and issubclass(
        cls, (Trainer, TrainingArguments)
    ):
        return cls
    if cls not in _guarded:
        _guarded[cls] = _compose(cls)
    return _guarded[cls]  # type: ignore[return-value]


def _not_a_class(given: Any) -> str:
    must = "`guard` takes a class of trainers or of training arguments"
    if isinstance(given, (Trainer, TrainingArguments)):
        name = type(given).__name__
        what = "arguments" if isinstance(given, TrainingArguments) else "a model and arguments"
        return f"{must}, got an object of `{name}`. Write `guard({name})(...)` with its {what}."
    return f"{must}, got {given!r}."


def _compose(cls: type) -> type:
    if issubclass(cls, Trainer):
        _check_training_loop(cls)
        mixin: type = DivGuardMixin
    elif issubclass(cls, TrainingArguments):
        mixin = DivGuardArgumentsMixin
    else:
        raise TypeError(
            "`guard` takes a class of trainers or of training arguments, but "
            f"`{cls.__name__}` extends neither `transformers.Trainer` nor `transformers.TrainingArguments`."
        )
    name = f"Guarded{cls.__name__}"
    doc = f"``{cls.__name__}`` with the guards of hf_divguard; see :class:`~hf_divguard.{mixin.__name__}`."
    namespace = {"__module__": cls.__module__, "__qualname__": name, "__doc__": doc, "_divguard_guards": cls}
    guarded = _metaclass(type(cls))(name, (mixin, cls), namespace)
    return dataclass(repr=False)(guarded) if mixin is DivGuardArgumentsMixin else guarded


def _check_training_loop(cls: type[Trainer]) -> None:
    parameters = inspect.signature(cls.train).parameters.values()
    takes_any = any(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters)
    if not takes_any and not any(each.name == "resume_from_checkpoint" for each in parameters):
        raise TypeError(
            f"The guards work inside the training loop of `transformers.Trainer`, but `{cls.__name__}` has a `train()` "
            "of its own that takes no `resume_from_checkpoint`. Pass a detector as a callback instead."
        )


def _metaclass(kind: type) -> type:
    """Return a metaclass that extends ``kind`` and whose classes are pickled as ``guard(cls)``.

    The name of a class that is made here is in no module, so pickle could not look it up in
    another process. A guarded class that a user extends is pickled by its name, as usual.
    """
    if kind not in _metaclasses:
        made = type("Guarded", (kind,), {"__doc__": "The type of the classes that ``guard`` makes."})
        copyreg.pickle(made, _reduce_class)
        _metaclasses[kind] = made
    return _metaclasses[kind]


def _reduce_class(cls: Any) -> str | tuple[Any, ...]:
    guards = vars(cls).get("_divguard_guards")
    return cls.__qualname__ if guards is None else (guard, (guards,))
