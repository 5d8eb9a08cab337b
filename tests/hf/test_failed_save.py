"""`on_save` comes only with the folder of that step, whatever kept a save from taking place."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_divguard import NonFiniteDetector
from hf_divguard.storage.checkpoints import find_checkpoints
from hf_divguard.storage.failpoints import watch_failpoints
from tests.conftest import AskAt
from tests.hf import scenarios

MakeTrainer = Callable[..., Any]


class CopyAway(TrainerCallback):
    """Copies each checkpoint in `on_save`, as uploading callbacks do."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        shutil.copytree(f"{args.output_dir}/{name}", f"{args.output_dir}-copy/{name}")
        self.steps.append(state.global_step)


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, trainer: Any, *, at_step: int, moment: str) -> Iterator[None]:
    """Let the disk be full while the host writes a file, or at a failpoint."""
    real = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "optimizer" in str(path) and trainer.state.global_step == at_step:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, path, *args, **kwargs)

    if moment == "host writes":
        monkeypatch.setattr(torch, "save", save)
    with watch_failpoints(fail_at(trainer, at_step, moment)):
        yield


def fail_at(trainer: Any, step: int, moment: str) -> Callable[[str], None]:
    def listen(name: str) -> None:
        if name == moment and trainer.state.global_step == step:
            raise OSError(errno.ENOSPC, "No space left on device")

    return listen


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("moment", ["host writes", "manifest written"])
def test_a_save_that_failed_sends_no_on_save_and_training_goes_on(
    moment: str, mode: str, make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = CopyAway()
    trainer = make_trainer(
        callbacks=[copies], eval_on_save=True, divguard_on_save_error="continue", divguard_save_mode=mode
    )
    with full_disk(monkeypatch, trainer, at_step=4, moment=moment):
        trainer.train()
    assert trainer.state.global_step == 8
    assert copies.steps == [2, 6, 8]
    assert [info.step for info in find_checkpoints(tmp_path / "out")] == [2, 6, 8]


def test_a_save_that_failed_at_an_evaluation_sends_no_on_save(make_trainer: MakeTrainer) -> None:
    copies = CopyAway()
    trainer = make_trainer(
        callbacks=[copies],
        divguard_on_save_error="continue",
        divguard_save_mode="staged",
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
    )
    with watch_failpoints(fail_at(trainer, 2, "manifest written")):
        trainer.train()
    assert trainer.state.global_step == 8
    assert copies.steps == [4, 6, 8]


class Poison(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            next(model.parameters()).data.fill_(math.nan)


class InsistsOnSaving(TrainerCallback):
    """Asks for a save where an abort has cancelled it."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = True


@pytest.mark.parametrize("action", ["abort", "rollback"])
def test_a_save_that_the_guards_forbid_sends_no_on_save(
    action: str, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    copies = CopyAway()
    detector = NonFiniteDetector(action=action)
    trainer = make_trainer(
        callbacks=[Poison(), detector, InsistsOnSaving(), copies], divguard_check_steps=1, max_steps=6
    )
    trainer.train()
    present = {info.step for info in find_checkpoints(tmp_path / "out")}
    assert present <= set(copies.steps)


def test_the_control_asks_for_no_save_after_one_that_failed(make_trainer: MakeTrainer) -> None:
    seen: list[bool] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                seen.append(control.should_save)

    trainer = make_trainer(callbacks=[Look()], eval_on_save=True, divguard_on_save_error="continue")
    trainer.add_callback(AskAt(save=[3]))
    with watch_failpoints(fail_at(trainer, 4, "manifest written")):
        trainer.train()
    assert seen == [False]


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.trainer_jit_checkpoint") is None,
    reason="this version of Transformers has no save on SIGTERM",
)
def test_the_hosts_save_on_sigterm_that_failed_ends_training_as_asked(
    run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = run_ranks(
        scenarios.sigterm_on_a_full_disk,
        output_dir=tmp_path / "out",
        at_step=3,
        divguard_on_save_error="continue",
    )[0]
    assert outcome.check()["step"] == 3
