"""Rollback, saving and losses without a Trainer: on a host that takes the steps a test asks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_divguard import TrainingDivergedError
from hf_divguard.core.detection.detector import StepValues
from hf_divguard.core.findings import Finding
from hf_divguard.hf.control import outcome_of
from hf_divguard.hf.journal import RunJournal
from hf_divguard.hf.losses import StepLosses
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.rollback import Rollback
from hf_divguard.hf.saving import Checkpoints
from hf_divguard.hf.snapshots import Snapshots
from hf_divguard.storage.integrity import verify_checkpoint
from tests.hf.fake_host import FakeHost
from tests.tiny import checkpoint_steps


class Run:
    """Checkpoints and rollback on one fake host."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.host = FakeHost(folder, **options)
        self.ranks = Ranks(0, 1)
        self.checkpoints = Checkpoints(
            self.host, self.host.args, self.ranks, str(folder), None, is_active=True
        )
        self.rewound: list[int] = []
        self.rollback = Rollback(
            self.host,
            self.host.args,
            ledger=self.checkpoints.ledger,
            ranks=self.ranks,
            journal=RunJournal(str(folder), "run", self.ranks),
            snapshots=Snapshots(0, check_steps=10, margin_steps=0),
            comparison=None,
            leads=self.checkpoints.leads,
            detectors={},
            watches_damage=False,
            on_rewind=self.rewound.append,
        )

    def save(self, metric: float | None = None) -> None:
        self.checkpoints.save(
            write=self.host.write,
            note_best=lambda: None,
            metric=metric,
            callback_states={},
            damaged_by=outcome_of(self.host.state).damaged_by,
        )

    def train_to(self, step: int) -> None:
        while self.host.state.global_step < step:
            self.host.train_step()
            self.save()

    def weights(self) -> torch.Tensor:
        return self.host.model.weight.detach().clone()

    def ask(self, onset_step: int) -> Any:
        step = self.host.state.global_step
        finding = Finding(step, onset_step, "jump", "error", "loss", 9.0, 2.0, f"`loss` = 9 at step {step}.")
        outcome_of(self.host.state).request_rollback(finding)
        return self.rollback.perform(self.host.model, torch.zeros(()))


def test_a_rollback_restores_the_newest_state_from_before_the_onset(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train_to(5)
    wanted = run.weights()
    run.train_to(9)
    event = run.ask(onset_step=7)
    assert (event.step, event.target_step, event.target, event.steps_lost) == (9, 5, "checkpoint-5", 4)
    assert torch.equal(run.weights(), wanted)
    assert run.rewound == [5]
    assert run.host.logs[0]["divguard/target_step"] == 5
    assert run.checkpoints.ledger.quarantined == {6, 7, 8, 9}


def test_a_suspect_is_neither_a_target_nor_in_the_place_of_one_that_stays(tmp_path: Path) -> None:
    """While an incident is open, the next older good state is protected."""
    run = Run(tmp_path)
    run.train_to(9)
    run.checkpoints.ledger.mark_suspect(5)
    run.checkpoints.ledger.mark_suspect(3)
    assert run.ask(onset_step=7).target_step == 4
    assert run.rollback.protected_steps() == {4, 2}


def test_what_was_marked_before_a_resume_counts_again_with_the_rest(tmp_path: Path) -> None:
    """A run that is resumed from a suspect checkpoint, and whose condition ends then."""
    run = Run(tmp_path)
    run.train_to(6)
    finding = Finding(6, 5, "jump", "error", "loss", 9.0, 2.0, "`loss` = 9 at step 6.")
    run.checkpoints.follow_condition(finding)
    ranks, host = run.ranks, run.host
    resumed = Checkpoints(
        host, host.args, ranks, str(tmp_path), str(tmp_path / "checkpoint-6"), is_active=True
    )
    assert resumed.ledger.suspects == {4, 5, 6}
    resumed.follow_condition(finding)
    assert resumed.follow_condition(None)
    assert resumed.ledger.suspects == set()
    assert verify_checkpoint(tmp_path / "checkpoint-5").status == "complete"


@pytest.mark.parametrize("fsync", [True, False])
def test_marks_of_checkpoints_are_flushed_as_checkpoints_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    """A mark that a power cut takes away leaves a checkpoint from under a fault that counts."""
    run = Run(tmp_path, divguard_fsync=fsync)
    run.train_to(9)
    real, flushed = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(descriptor), real(descriptor)))
    finding = Finding(9, 9, "jump", "error", "loss", 9.0, 2.0, "`loss` = 9 at step 9.")
    assert run.checkpoints.follow_condition(finding)
    after_mark = len(flushed)
    run.ask(onset_step=8)
    assert (after_mark > 0, len(flushed) > after_mark) == (fsync, fsync)


def test_without_a_request_nothing_is_restored(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train_to(3)
    before = run.weights()
    assert run.rollback.perform(run.host.model, torch.zeros(())) is None
    assert torch.equal(run.weights(), before)


def test_a_run_that_no_state_can_help_ends_with_an_error_and_saves_nothing_more(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train_to(3)
    assert run.ask(onset_step=1) is None
    assert isinstance(run.rollback.error, TrainingDivergedError)
    assert not outcome_of(run.host.state).may_save
    assert run.host.control.should_training_stop


def test_a_save_is_published_and_asks_the_host_to_rotate(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train_to(2)
    assert checkpoint_steps(tmp_path) == {1, 2}
    assert run.host.rotations == 2


def test_rotation_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    options = {"preserve_best_model": True, "eval_on_save": True, "save_total_limit": 1}
    run = Run(tmp_path, **options)
    for loss in (3.0, 1.0, 2.0, 4.0):
        run.host.train_step()
        run.save(metric=loss)
        run.checkpoints.rotate()
    assert checkpoint_steps(tmp_path) == {2, 4}
    assert run.host.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


class Listener:
    def __init__(self) -> None:
        self.values: list[StepValues] = []

    def on_raw_losses(self, values: list[StepValues], args: Any, state: Any, control: Any) -> None:
        self.values += values


@pytest.mark.parametrize("check_steps", [1, 3])
def test_every_listener_gets_every_loss_once(tmp_path: Path, check_steps: int) -> None:
    host, losses, listeners = FakeHost(tmp_path), StepLosses(check_steps, 1), [Listener(), Listener()]
    for listener in listeners:
        losses.subscribe(listener)
    for step in range(1, 8):
        host.state.global_step = step
        losses.micro_batches.append(torch.tensor(float(step)))
        delivered = losses.end_step(host, None)
        assert delivered == (step % check_steps == 0)
    losses.deliver(host)
    for listener in listeners:
        assert [(entry.step, entry.loss) for entry in listener.values] == [(n, float(n)) for n in range(1, 8)]


def test_without_a_listener_nothing_is_collected(tmp_path: Path) -> None:
    losses = StepLosses(1, 1)
    assert not losses.is_collecting
    assert not losses.end_step(FakeHost(tmp_path), None)
