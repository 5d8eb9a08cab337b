"""A guarded run switches back whatever it switched on, and stays the last in the order of callbacks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import (
    AdaptiveDivergenceDetector,
    DivGuardTrainer,
    DualWindowDivergenceDetector,
    NonFiniteDetector,
)
from hf_divguard.core.detection.detector import StepValues
from tests.hf import scenarios
from tests.tiny import checkpoint_steps

MakeTrainer = Callable[..., Any]


class LogNaN(TrainerCallback):
    """Puts NaN into the log from step 3 on."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs and state.global_step >= 3:
            logs["loss"] = float("nan")


def stops_at_under_the_stock_trainer(make_trainer: MakeTrainer, detector: Any) -> int:
    """Return the step at which ``detector`` ends a stock run whose logs turn NaN at step 3."""
    stock = {"trainer_class": Trainer, "arguments_class": TrainingArguments, "save_strategy": "no"}
    trainer = make_trainer(callbacks=[detector], **stock)
    trainer.callback_handler.callbacks.insert(0, LogNaN())
    trainer.train()
    return int(trainer.state.global_step)


FAILURES = {
    "refused option": ({"save_only_model": True}, ValueError),
    "same name twice": ({"names": True}, ValueError),
    "output folder is a file": ({"blocked": True}, Exception),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_start_that_fails_leaves_detectors_arguments_and_callbacks_as_they_were(
    make_trainer: MakeTrainer, tmp_path: Path, failure: str
) -> None:
    options, error = FAILURES[failure]
    options = dict(options)
    detector = AdaptiveDivergenceDetector(action="rollback")
    callbacks: list[Any] = [detector]
    if options.pop("names", False):
        callbacks += [
            DualWindowDivergenceDetector(2, 5, name="one"),
            DualWindowDivergenceDetector(2, 5, name="one"),
        ]
    blocked = options.pop("blocked", False)
    trainer = make_trainer(tmp_path / "blocked", callbacks=callbacks, save_total_limit=2, **options)
    if blocked:
        os.rmdir(tmp_path / "blocked") if (tmp_path / "blocked").is_dir() else None
        (tmp_path / "blocked").write_text("in the way")
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(error):
        trainer.train()
    assert trainer.callback_handler.callbacks == before
    assert trainer.args.save_total_limit == 2
    assert not detector.takes_raw_losses
    assert not detector.state_keeper.kept_by_trainer
    detector.action = "stop"
    assert stops_at_under_the_stock_trainer(make_trainer, detector) == 3


def test_an_error_in_the_loop_switches_everything_back(make_trainer: MakeTrainer) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("broken")

    detector = NonFiniteDetector(action="stop")
    trainer = make_trainer(callbacks=[detector, Breaks()])
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert trainer.callback_handler.callbacks == before
    assert stops_at_under_the_stock_trainer(make_trainer, detector) == 3


def test_the_state_of_a_healthy_run_has_the_documented_attributes(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(divguard_detector="adaptive", max_steps=3)
    names = ("divguard_finding", "divguard_stop_reason", "divguard_aborted", "divguard_muted_until")
    for _ in range(2):
        assert [getattr(trainer.state, name) for name in names] == [None, None, False, -1]
        trainer.train()


def test_the_documented_attributes_are_read_only(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=1)
    with pytest.raises(AttributeError):
        trainer.state.divguard_finding = "mine"


# ---- the order of callbacks


class Watcher(NonFiniteDetector):
    """Counts the raw losses it gets."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.values: list[StepValues] = []

    def on_raw_losses(self, values: list[StepValues], *args: Any) -> None:
        self.values += values
        super().on_raw_losses(values, *args)


class Adds(TrainerCallback):
    """Adds a callback when training begins."""

    def __init__(self, add: Callable[[Any], None], callback: Any) -> None:
        self.add, self.callback = add, callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.add(self.callback)


class NotesOrder(TrainerCallback):
    """Notes at each step which callback is the last one."""

    def __init__(self) -> None:
        self.last: list[str] = []
        self.handler: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last.append(type(self.handler.callbacks[-1]).__name__)


@pytest.mark.parametrize("way", ["add_callback", "handler"])
def test_a_callback_that_another_one_adds_comes_before_ours_and_is_guarded(
    make_trainer: MakeTrainer, way: str
) -> None:
    order, added = NotesOrder(), Watcher(action="warn", name="added")
    trainer = make_trainer(callbacks=[order], max_steps=4, save_steps=2, eval_on_save=True)
    order.handler = trainer.callback_handler
    add = trainer.add_callback if way == "add_callback" else trainer.callback_handler.add_callback
    trainer.callback_handler.callbacks.insert(0, Adds(add, added))
    trainer.train()
    assert set(order.last) == {"RunEvents"}
    assert [entry.step for entry in added.values] == [1, 2, 3, 4]
    assert "added" in trainer._run.callbacks.stateful
    assert not added.takes_raw_losses


# ---- rotation


class KeepsEvenHundreds(DivGuardTrainer):
    """Extends the rotation, as a user may."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[set[int]] = []

    def _rotate_checkpoints(self, use_mtime: bool = False, output_dir: str | None = None) -> None:
        super()._rotate_checkpoints(use_mtime=use_mtime, output_dir=output_dir)
        self.seen.append(checkpoint_steps(self.args.output_dir))


def test_a_subclass_extends_the_rotation_and_sees_what_is_left(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        trainer_class=KeepsEvenHundreds, eval_on_save=True, preserve_best_model=True, save_total_limit=1
    )
    trainer.train()
    best = trainer.best_checkpoints()[0].step
    assert trainer.seen[-1] == {best, 8}
    assert {8}.issubset(trainer.seen[-1])


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")
def test_with_every_option_off_the_rotation_is_extended_too(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(trainer_class=KeepsEvenHundreds, save_total_limit=1)
    trainer.train()
    assert trainer.seen[-1] == {8}


# ---- a save outside of the end of a step


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.trainer_jit_checkpoint") is None,
    reason="this version of Transformers has no save on SIGTERM",
)
def test_a_save_on_sigterm_loses_no_loss(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    seen = run_ranks(scenarios.losses_before_sigterm, output_dir=tmp_path / "out", at_step=5)[0].check()
    assert seen == {"saved": [5], "losses": [1, 2, 3, 4, 5]}
