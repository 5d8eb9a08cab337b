"""The guarded class that takes the place of ``Trainer`` in a script."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_divguard import DivGuardArgumentsMixin
from hf_divguard.cli.guard_script import guard_arguments, guarded_trainer
from tests.tiny import base_arguments

OPTIONS = {"divguard_detector": "adaptive", "divguard_check_steps": 3}


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(**base_arguments(tmp_path))


def test_the_same_arguments_get_the_options(arguments: TrainingArguments) -> None:
    guarded = guard_arguments(arguments, OPTIONS)
    assert guarded is arguments
    assert isinstance(guarded, DivGuardArgumentsMixin)
    assert guarded.to_dict()["divguard_check_steps"] == 3
    assert "divguard_check_steps=3" in str(guarded)
    assert type(guarded).__name__ == "TrainingArguments"


def test_a_subclass_of_arguments_keeps_its_fields(tmp_path: Path) -> None:
    guarded = guard_arguments(
        Seq2SeqTrainingArguments(**base_arguments(tmp_path), predict_with_generate=True), OPTIONS
    )
    assert guarded.predict_with_generate is True
    assert isinstance(guarded, Seq2SeqTrainingArguments)


def test_copies_keep_the_options(arguments: TrainingArguments) -> None:
    guarded = guard_arguments(arguments, OPTIONS)
    for twin in (copy.copy(guarded), copy.deepcopy(guarded), dataclasses.replace(guarded, seed=5)):
        assert isinstance(twin, DivGuardArgumentsMixin)
        assert twin.divguard_check_steps == 3


def test_a_pickled_copy_is_of_the_class_of_the_host(arguments: TrainingArguments) -> None:
    guarded = guard_arguments(arguments, OPTIONS)
    loaded = pickle.loads(pickle.dumps(guarded))
    assert pickle.loads(pickle.dumps(type(guarded))) is TrainingArguments
    assert type(loaded) is TrainingArguments
    assert loaded.divguard_check_steps == 3  # type: ignore[attr-defined]


def test_options_that_contradict_the_script_raise(arguments: TrainingArguments) -> None:
    with pytest.raises(ValueError, match="preserve_n_best"):
        guard_arguments(arguments, {"preserve_n_best": 0})


def test_the_class_looks_like_the_trainer() -> None:
    guarded = guarded_trainer(Trainer, OPTIONS)
    assert (guarded.__name__, guarded.__module__) == (Trainer.__name__, Trainer.__module__)
    assert inspect.signature(guarded.__init__) == inspect.signature(Trainer.__init__)
    assert guarded.__doc__ == Trainer.__doc__
    assert issubclass(guarded, Trainer)


def test_it_trains_with_the_detector(make_trainer: Callable[..., Any]) -> None:
    made: list[int] = []
    guarded = guarded_trainer(Trainer, OPTIONS, lambda: made.append(1))
    trainer = make_trainer(trainer_class=guarded, arguments_class=TrainingArguments, max_steps=4)
    trainer.train()
    assert made == [1]
    assert any(
        type(each).__name__ == "AdaptiveDivergenceDetector" for each in trainer.callback_handler.callbacks
    )
    assert trainer.state.divguard_finding is None
