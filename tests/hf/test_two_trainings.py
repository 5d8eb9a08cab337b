"""Two trainings in one folder: the second is refused before it changes anything, the first is not disturbed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_divguard import FolderInUseError, find_checkpoints
from hf_divguard.storage.failpoints import watch_failpoints
from hf_divguard.storage.lock import FolderLock
from tests.hf import scenarios
from tests.processes import fork, wait_for
from tests.tiny import checkpoint_steps, tiny_model

GUARDED = {"eval_on_save": True, "save_steps": 2, "max_steps": 6}


class Waits(TrainerCallback):
    """Waits at the start of step 4 until a file is there."""

    def __init__(self, around: Path) -> None:
        self._around = around

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            (self._around / "waits").touch()
            wait_for_file(self._around / "go")


def wait_for_file(path: Path) -> None:
    until = time.monotonic() + 40
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.02)


def files_in(folder: Path) -> dict[str, float]:
    """Return every file of a run with its time stamp, those of the lock excepted."""
    return {
        str(path): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "divguard"
    }


@pytest.fixture
def first(make_trainer: Callable[..., Any], tmp_path: Path) -> int:
    """A process that trains in ``out`` and stands in the middle of its second save."""

    def work() -> None:
        def stand(moment: str) -> None:
            if moment == "host wrote" and trainer.state.global_step == 4:
                (tmp_path / "waits").touch()
                wait_for_file(tmp_path / "go")

        trainer = make_trainer(tmp_path / "out", **GUARDED)
        with watch_failpoints(stand):
            trainer.train()

    pid = fork(work, tmp_path / "log")
    wait_for_file(tmp_path / "waits")
    return pid


@pytest.mark.parametrize("resume", [True, "latest", None])
def test_the_second_is_refused_and_the_first_is_not_disturbed(
    resume: Any, first: int, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    before = files_in(tmp_path / "out")
    second = make_trainer(tmp_path / "out", **GUARDED)
    with pytest.raises(FolderInUseError, match=f"in use by process {first} on host .*, since 20"):
        second.train(resume_from_checkpoint=resume)
    assert files_in(tmp_path / "out") == before
    (tmp_path / "go").touch()
    assert wait_for(first) == 0
    assert [info.verdict.status for info in find_checkpoints(tmp_path / "out")] == ["complete"] * 3


def test_a_second_one_without_any_option_is_refused_too(
    first: int, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(FolderInUseError):
        make_trainer(tmp_path / "out", max_steps=6).train(resume_from_checkpoint=True)
    (tmp_path / "go").touch()
    assert wait_for(first) == 0


def test_after_a_kill_the_next_start_goes_on_at_once(
    first: int, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    os.kill(first, signal.SIGKILL)
    wait_for(first)
    trainer = make_trainer(tmp_path / "out", **GUARDED)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_workers_of_a_killed_training_do_not_keep_the_lock(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    def work() -> None:
        options = {**GUARDED, "dataloader_num_workers": 2}
        make_trainer(tmp_path / "out", callbacks=[Waits(tmp_path)], **options).train()

    pid = fork(work, tmp_path / "log")
    wait_for_file(tmp_path / "waits")
    os.kill(pid, signal.SIGKILL)
    wait_for(pid)
    trainer = make_trainer(tmp_path / "out", **GUARDED)
    trainer.train()
    assert trainer.state.global_step == 6


def test_one_process_may_train_again_and_again(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", **GUARDED)
    trainer.train()
    trainer.train()
    make_trainer(tmp_path / "out", **{**GUARDED, "max_steps": 8}).train(resume_from_checkpoint=True)
    assert 8 in checkpoint_steps(tmp_path / "out")


class Fails(TrainerCallback):
    def __init__(self, error: Exception) -> None:
        self._errors = [error]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and self._errors:
            raise self._errors.pop()


def test_a_training_that_raised_leaves_no_lock(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", callbacks=[Fails(KeyError("a bug"))], **GUARDED)
    with pytest.raises(KeyError):
        trainer.train()
    make_trainer(tmp_path / "out", **GUARDED).train(resume_from_checkpoint=True)


def test_a_smaller_batch_is_tried_under_the_same_lock(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    error = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    trainer = make_trainer(tmp_path / "out", callbacks=[Fails(error)], auto_find_batch_size=True, **GUARDED)
    trainer.train()
    assert trainer.state.global_step == 6


def test_each_trial_of_a_search_has_a_folder_of_its_own(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    trainer = make_trainer(tmp_path / "out", **GUARDED)
    trainer.model_init = lambda trial=None: tiny_model()
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        n_trials=2,
        backend="optuna",
        compute_objective=lambda metrics: metrics.get("eval_loss", 0.0),
    )
    assert len([path for path in (tmp_path / "out").iterdir() if (path / "divguard" / "lock").exists()]) == 2


def test_without_any_option_nothing_is_written(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    make_trainer(tmp_path / "out", max_steps=2).train()
    make_trainer(tmp_path / "out", max_steps=4).train(resume_from_checkpoint=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint-2", "checkpoint-4"]


def test_all_ranks_are_refused_with_the_same_error(run_ranks: Callable[..., Any], tmp_path: Path) -> None:
    held = FolderLock(tmp_path / "out", "first")
    held.acquire()
    first, second = run_ranks(scenarios.train, 2, output_dir=tmp_path / "out", timeout=60)
    held.release()
    assert first.error == second.error
    assert str(first.error).startswith("FolderInUseError: ")
    for outcome in run_ranks(scenarios.train, 2, output_dir=tmp_path / "out"):
        assert outcome.check()["step"] == 8
