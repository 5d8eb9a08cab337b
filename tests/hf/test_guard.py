"""``guard`` gives any class of trainers or arguments the guards, in the right order, under a name that pickles."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_divguard import (
    DivGuardArgumentsMixin,
    DivGuardMixin,
    DivGuardTrainer,
    DivGuardTrainingArguments,
    guard,
)
from tests.processes import run_python
from tests.tiny import TokenRows, base_arguments, tiny_model


@dataclass
class UserArguments(TrainingArguments):
    """Arguments of a user, with a field and a check of their own."""

    mood: str = "calm"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mood = self.mood.upper()


class UserTrainer(Trainer):
    """A trainer of a user, with a loss of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss


class ExtendedTrainer(guard(UserTrainer)):  # type: ignore[misc]
    """A class that extends a guarded one."""


@dataclass
class MoreArguments(guard(UserArguments)):  # type: ignore[misc]
    """Arguments that extend guarded ones."""

    more: int = 3


def quick(cls: Any, **options: Any) -> Any:
    return cls(**{"output_dir": "out", "use_cpu": True, "report_to": "none", **options})


class LoadsItself(Trainer):
    """A trainer that loads weights in its own way and takes no model for it, as that of sentence-transformers."""

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        super()._load_from_checkpoint(checkpoint_path)


def test_a_trainer_that_loads_weights_in_its_own_way_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"divguard_detector": "adaptive", "eval_strategy": "no"}
    for steps, resumes in ((4, False), (8, True)):
        args = DivGuardTrainingArguments(**base_arguments(tmp_path, save_steps=4, max_steps=steps, **options))
        trainer = guard(LoadsItself)(tiny_model(), args, train_dataset=TokenRows())
        trainer.train(resume_from_checkpoint=resumes or None)
    trainer.load_last_good()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == list(range(1, 9))


# ---- what it makes


@pytest.mark.parametrize("cls", [Seq2SeqTrainer, UserTrainer])
def test_a_trainer_class_gets_the_mixin_on_its_left_and_a_name_that_reads_well(cls: Any) -> None:
    guarded = guard(cls)
    assert guarded.__bases__ == (DivGuardMixin, cls)
    assert guarded.__name__ == guarded.__qualname__ == f"Guarded{cls.__name__}"
    assert cls.__name__ in guarded.__doc__


@pytest.mark.parametrize("cls", [Seq2SeqTrainingArguments, UserArguments])
def test_a_class_of_arguments_gets_the_options_as_fields_after_its_own(cls: Any) -> None:
    guarded = guard(cls)
    assert [each.name for each in fields(guarded)][: len(fields(TrainingArguments))] == [
        each.name for each in fields(TrainingArguments)
    ]
    assert {each.name for each in fields(guarded)} == {
        each.name for part in (cls, DivGuardArgumentsMixin) for each in fields(part)
    }
    assert quick(guarded, eval_on_save=True).eval_on_save is True
    with pytest.raises(ValueError, match="preserve_n_best"):
        quick(guarded, preserve_n_best=0)


def test_the_checks_of_a_users_arguments_run_too() -> None:
    args = quick(guard(UserArguments), mood="glad", divguard_detector="ema")
    assert (args.mood, args.divguard_detector) == ("GLAD", "ema")


def test_the_same_class_is_returned_every_time() -> None:
    assert guard(UserTrainer) is guard(UserTrainer)
    assert guard(UserArguments) is guard(UserArguments)


@pytest.mark.parametrize(
    "cls",
    [DivGuardTrainer, DivGuardTrainingArguments, guard(UserTrainer), ExtendedTrainer, MoreArguments],
    ids=lambda cls: cls.__name__,
)
def test_a_guarded_class_is_returned_as_it_is(cls: Any) -> None:
    assert guard(cls) is cls


def test_the_stock_classes_become_those_of_the_package() -> None:
    assert guard(Trainer) is DivGuardTrainer
    assert guard(TrainingArguments) is DivGuardTrainingArguments


def test_options_of_a_guarded_class_are_flags() -> None:
    (args,) = HfArgumentParser(guard(UserArguments)).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "true", "--mood", "brave", "--eval_on_save"]
    )
    assert (args.mood, args.eval_on_save) == ("BRAVE", True)


def test_two_classes_of_one_name_are_two_guarded_classes() -> None:
    first, second = (type("Same", (Trainer,), {}) for _ in range(2))
    assert guard(first) is not guard(second)


def test_a_run_of_guarded_classes_trains_evaluates_and_keeps_its_best(
    make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(
        trainer_class=guard(UserTrainer),
        arguments_class=guard(UserArguments),
        eval_on_save=True,
        preserve_best_model=True,
        max_steps=4,
    )
    trainer.train()
    assert [entry.step for entry in trainer.best_checkpoints()] == [4]
    saved = torch.load(tmp_path / "out" / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert type(saved) is guard(UserArguments)
    assert saved.to_dict() == trainer.args.to_dict()


def test_the_representation_of_arguments_hides_tokens_as_the_stock_one_does() -> None:
    args = quick(guard(UserArguments), hub_token="secret")
    assert "secret" not in str(args)
    assert "secret" not in repr(quick(DivGuardTrainingArguments, hub_token="secret"))


# ---- pickling


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "cls",
    [
        guard(UserTrainer),
        guard(UserArguments),
        guard(Seq2SeqTrainingArguments),
        ExtendedTrainer,
        MoreArguments,
    ],
)
def test_a_guarded_class_pickles(cls: Any, protocol: int) -> None:
    assert pickle.loads(pickle.dumps(cls, protocol)) is cls


@pytest.mark.parametrize("cls", [guard(UserArguments), guard(Seq2SeqTrainingArguments), MoreArguments])
def test_arguments_of_a_guarded_class_pickle_and_copy(cls: Any) -> None:
    args = quick(cls, eval_on_save=True)
    for again in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args), dataclasses.replace(args)):
        assert type(again) is cls
        assert again.to_dict() == args.to_dict()


def test_saved_arguments_load_in_a_process_that_has_guarded_nothing_yet(tmp_path: Path) -> None:
    torch.save(quick(guard(Seq2SeqTrainingArguments), preserve_n_best=2), tmp_path / "training_args.bin")
    done = run_python(
        "-c",
        "import sys, torch\n"
        "args = torch.load(sys.argv[1], weights_only=False)\n"
        "print(type(args).__name__, args.preserve_n_best)\n",
        str(tmp_path / "training_args.bin"),
    )
    assert done.stdout.split() == ["GuardedSeq2SeqTrainingArguments", "2"], done.stderr


# ---- refusals


class OwnLoop(Trainer):
    """A trainer that does not use the host's loop."""

    def train(self) -> None:  # type: ignore[override]
        """Train in its own way."""


REFUSED = {
    "an object of a trainer's arguments": (
        lambda: quick(UserArguments),
        r"takes a class .* got an object of `UserArguments`. Write `guard\(UserArguments\)\(...\)`",
    ),
    "a name": (lambda: "SFTTrainer", "takes a class of trainers or of training arguments, got 'SFTTrainer'"),
    "none": (lambda: None, "got None"),
    "a model": (lambda: torch.nn.Linear, "`Linear` extends neither `transformers.Trainer` nor"),
    "a callback": (lambda: TrainerCallback, "`TrainerCallback` extends neither"),
    "a mixin alone": (lambda: DivGuardMixin, "`DivGuardMixin` extends neither"),
    "a trainer with a loop of its own": (
        lambda: OwnLoop,
        "`OwnLoop` has a `train\\(\\)` of its own .* Pass a detector as a callback",
    ),
}


@pytest.mark.parametrize(("make", "sentence"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_with_what_to_do(make: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        guard(make())


def test_a_trainer_is_refused_with_its_class_to_guard(make_trainer: Any) -> None:
    with pytest.raises(
        TypeError, match=r"object of `DivGuardTrainer`. Write `guard\(DivGuardTrainer\)\(...\)`"
    ):
        guard(make_trainer())


# ---- classes made by hand


def test_the_mixin_of_arguments_on_the_wrong_side_is_refused_where_the_class_is_made() -> None:
    with pytest.raises(
        TypeError, match=r"must stand left of .* `Swapped` has it on the right.* Swap the two"
    ):
        type("Swapped", (Seq2SeqTrainingArguments, DivGuardArgumentsMixin), {})


@pytest.mark.parametrize(
    ("bases", "sentence"),
    [
        ((DivGuardArgumentsMixin, Trainer), "`Odd` is a Trainer. Use `DivGuardMixin`"),
        (
            (DivGuardMixin, TrainingArguments),
            "`Odd` is a class of training arguments. Use `DivGuardArgumentsMixin`",
        ),
    ],
)
def test_the_mixin_of_the_other_kind_is_refused(bases: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        type("Odd", bases, {})


def test_a_class_of_arguments_that_is_no_dataclass_is_refused_where_an_object_is_made() -> None:
    class Bare(DivGuardArgumentsMixin, TrainingArguments):
        pass

    with pytest.raises(TypeError, match=r"`Bare` must be a dataclass.* Write `@dataclass` above the class"):
        quick(Bare)


def test_a_class_of_arguments_that_cannot_be_stored_is_refused_before_the_first_step(
    make_trainer: Any,
) -> None:
    @dataclass
    class Local(DivGuardArgumentsMixin, TrainingArguments):
        pass

    with pytest.raises(TypeError, match=r"importable by its name.*`.*Local` is not.*at the top of a module"):
        make_trainer(arguments_class=Local)
    make_trainer(arguments_class=Local, save_strategy="no")
