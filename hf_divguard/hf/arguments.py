"""The options of hf_divguard as fields of ``TrainingArguments``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from hf_divguard.hf.argument_checks import (
    check_combinations,
    check_ranking_has_evaluations,
    check_something_is_saved,
    warn_of_options_without_effect,
)
from hf_divguard.hf.options.best_checkpoints import BestCheckpointOptions
from hf_divguard.hf.options.comparison import ComparisonOptions
from hf_divguard.hf.options.detection import DetectionOptions, DetectorName
from hf_divguard.hf.options.reporting import ReportingOptions
from hf_divguard.hf.options.rollback import RollbackOptions
from hf_divguard.hf.options.saving import SaveMode, SavingOptions
from hf_divguard.hf.options.values import did_you_mean
from hf_divguard.hf.unguarded import warn_if_unguarded

__all__ = [
    "DetectorName",
    "DivGuardArgumentsMixin",
    "DivGuardTrainingArguments",
    "SaveMode",
    "changed_options",
    "options_of",
]

_GROUPS: tuple[Any, ...] = (
    BestCheckpointOptions,
    SavingOptions,
    DetectionOptions,
    ComparisonOptions,
    RollbackOptions,
    ReportingOptions,
)

# To a type checker the mixin is the class of arguments it will be mixed into.
if TYPE_CHECKING:
    _Host = TrainingArguments
else:
    _Host = object


# Fields come in the order of the last base to the first: with a new group, here and in ``_GROUPS``.
@dataclass(repr=False, eq=False)
class DivGuardArgumentsMixin(
    ReportingOptions,
    RollbackOptions,
    ComparisonOptions,
    DetectionOptions,
    SavingOptions,
    BestCheckpointOptions,
    _Host,
):
    """Adds the options of hf_divguard to any ``TrainingArguments`` dataclass.

    Put it left of the class it extends. Each field says what it does in its help text
    (``--help`` on a command line). With every field at its default the training is the
    stock one. :func:`hf_divguard.guard` makes such a class in one line.

    An option that has no effect as the others are set is a warning: when the arguments are
    made, or, where it depends on the callbacks, when training starts. In a Trainer that is not
    guarded none of them has an effect. That is noticed when training starts, by the request for
    the warm-up steps or by a detector among the callbacks. A Trainer with a schedule that was
    passed to it and without a detector does not ask, and nothing can be said.

    Raises:
        TypeError: When a class is made that has the mixin on the right of the class it
            extends; when an object is made of a class that is no dataclass.
        ValueError: At construction, for values out of range and for options that
            contradict each other; the sentence says what to change.

    Example:
        >>> from dataclasses import dataclass
        >>> from transformers import Seq2SeqTrainingArguments
        >>> @dataclass
        ... class MyArguments(DivGuardArgumentsMixin, Seq2SeqTrainingArguments):
        ...     pass
        >>> args = MyArguments("out", save_steps=7, eval_on_save=True, load_best_model_at_end=True, use_cpu=True)
        >>> args.save_steps, str(args.eval_strategy.value), args.load_best_model_at_end
        (7, 'no', True)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        trainers = sys.modules.get("transformers.trainer")  # not imported for this question alone
        if trainers is not None and issubclass(cls, trainers.Trainer):
            raise TypeError(
                f"`DivGuardArgumentsMixin` extends a class of training arguments, but `{cls.__name__}` is a Trainer. "
                "Use `DivGuardMixin` for it."
            )
        if TrainingArguments in order and order.index(TrainingArguments) < order.index(
            DivGuardArgumentsMixin
        ):
            raise TypeError(
                f"`DivGuardArgumentsMixin` must stand left of the class of arguments it extends, but `{cls.__name__}` "
                "has it on the right, where none of its options is checked or has an effect. Swap the two."
            )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse a class without ``@dataclass``, whose ``__init__`` is not its own, and options that are misspelt."""
        maker = next(each for each in cls.__mro__ if "__init__" in vars(each))
        if maker in (DivGuardArgumentsMixin, *_GROUPS) and cls is not maker:
            raise TypeError(
                f"`{cls.__name__}` must be a dataclass, but it is not, so it takes the options of hf_divguard only. "
                "Write `@dataclass` above the class."
            )
        has_own_fields = getattr(vars(maker).get("__dataclass_params__"), "init", False)
        known = {option.name for option in fields(cls)}
        for name in kwargs.keys() - known if has_own_fields else ():
            if likely := did_you_mean(name, known):
                raise TypeError(f"`{cls.__name__}` has no option {name!r}.{likely}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for group in _GROUPS:
            group._check_values(self)
        check_combinations(self)
        if self.preserve_best_model:
            self._take_ranking_metric()
        # The parent couples load_best_model_at_end to aligned save and eval steps. An evaluation before every
        # save makes that needless, so the parent checks everything else with it switched off.
        lift_alignment = self.eval_on_save and bool(getattr(self, "load_best_model_at_end", False))
        if lift_alignment:
            self._fill_metric_for_best_model("loss")
            self.load_best_model_at_end = False
        try:
            super().__post_init__()
        finally:
            if lift_alignment:
                self.load_best_model_at_end = True
        if self.eval_on_save:
            check_something_is_saved(self)
        if self.preserve_best_model:
            check_ranking_has_evaluations(self)
        warn_of_options_without_effect(self, changed_options(self))

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the warm-up steps, as the stock arguments do; warn if the Trainer that asks is not guarded."""
        # The host asks when it makes the schedule, at the start of training.
        warn_if_unguarded(self, changed_options(self))
        return int(super().get_warmup_steps(num_training_steps))


def changed_options(args: Any) -> dict[str, Any]:
    """Return the options of hf_divguard that are not at their defaults; none for stock arguments.

    Example:
        >>> changed_options(DivGuardTrainingArguments("out", divguard_detector="ema", use_cpu=True))
        {'divguard_detector': 'ema'}
    """
    if not isinstance(args, DivGuardArgumentsMixin):
        return {}
    given = {
        option.name: (getattr(args, option.name), option.default) for option in fields(DivGuardArgumentsMixin)
    }
    return {name: value for name, (value, default) in given.items() if value != default}


def options_of(args: Any) -> Any:
    """Return what holds the options: ``args`` itself, or all defaults for a stock ``TrainingArguments``."""
    if isinstance(args, DivGuardArgumentsMixin):
        return args
    defaults = {option.name: option.default for option in fields(DivGuardArgumentsMixin)}
    return SimpleNamespace(**defaults, divguard_greater_is_better=False, divguard_ranking_key="eval_loss")


@dataclass(repr=False)
class DivGuardTrainingArguments(DivGuardArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with the options of hf_divguard.

    See :class:`DivGuardArgumentsMixin` for the fields that are added.

    Example:
        >>> args = DivGuardTrainingArguments(
        ...     "out", save_steps=7, save_total_limit=2, eval_on_save=True,
        ...     preserve_best_model=True, best_model_metric="accuracy", use_cpu=True)
        >>> args.divguard_ranking_key, args.divguard_greater_is_better
        ('eval_accuracy', True)
    """
