"""A run from scratch in the folder of an older one replaces its checkpoints only by complete ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import CheckpointSaveError
from hf_divguard.hf import checkpoint_writer
from hf_divguard.storage.failpoints import watch_failpoints
from tests.hf import scenarios
from tests.processes import kill_at
from tests.tiny import names_in

RunRanks = Callable[..., Any]
MakeTrainer = Callable[..., Any]


def train_and_die(rank: int, output_dir: str, moment: str, **options: Any) -> None:
    with kill_at(moment):
        scenarios.trainer_of(output_dir, max_steps=2, **options).train()


@pytest.fixture
def older(make_trainer: MakeTrainer, tmp_path: Path) -> tuple[Path, bytes]:
    """Return a run folder with a checkpoint of step 2, and its weights."""
    make_trainer(tmp_path / "out", max_steps=2, divguard_save_mode="staged", learning_rate=0.5).train()
    return tmp_path / "out", weights(tmp_path / "out")


def weights(run: Path) -> bytes:
    return (run / "checkpoint-2" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("moment", "mode"),
    [("host wrote", "staged"), ("host wrote", "in_place"), ("manifest written", "in_place")],
)
def test_after_a_kill_in_a_save_of_the_same_step_one_of_the_two_is_resumed(
    moment: str, mode: str, older: tuple[Path, bytes], run_ranks: RunRanks, make_trainer: MakeTrainer
) -> None:
    run, before = older
    (outcome,) = run_ranks(train_and_die, output_dir=run, moment=moment, divguard_save_mode=mode)
    assert outcome.error == "it ended with -9"
    trainer = make_trainer(run, max_steps=4, divguard_save_mode=mode)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 4
    assert (weights(run) == before) == (moment == "host wrote")


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("moment", ["manifest written", "old checkpoint set aside", "no room"])
def test_a_save_that_fails_leaves_the_older_checkpoint_of_its_step(
    moment: str,
    mode: str,
    older: tuple[Path, bytes],
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, before = older
    if (moment, mode) == ("old checkpoint set aside", "staged"):
        pytest.skip("nothing is set aside there before the new one is complete")

    def fail(*args: Any) -> None:
        raise OSError("the disk has failed")

    def listen(name: str) -> None:
        if name == moment:
            fail()

    if moment == "no room":
        monkeypatch.setattr(checkpoint_writer, "require_free_space", fail)
    trainer = make_trainer(run, max_steps=2, divguard_save_mode=mode)
    with watch_failpoints(listen), pytest.raises(CheckpointSaveError, match="the disk has failed"):
        trainer.train()
    assert names_in(run) == ["checkpoint-2"]
    assert weights(run) == before
