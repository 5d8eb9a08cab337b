"""Disks that are full, too small or read-only: the older checkpoints stay, and the error says what was needed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_divguard import CheckpointSaveError
from hf_divguard.storage.checkpoints import find_checkpoints, verify_checkpoint
from tests.hf import scenarios
from tests.tiny import names_in

GUARDED = {"eval_on_save": True, "max_steps": 8}


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def make_read_only(folder: Path) -> None:
    """Let nobody write to ``folder`` any more, open files excepted."""
    assert mount("--bind", str(folder), str(folder))
    assert mount("-o", "remount,bind,ro", str(folder))


@contextmanager
def disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """Yield a disk of its own, of real but little room."""
    folder.mkdir()
    if (
        os.name != "posix"
        or os.geteuid() != 0
        or not mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder))
    ):
        pytest.skip("only root can mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def kilobytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The room that one checkpoint takes on such a disk, in kilobytes."""
    from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
    from tests.tiny import TokenRows, base_arguments, tiny_model

    folder = tmp_path_factory.mktemp("measured")
    args = DivGuardTrainingArguments(**base_arguments(folder, **{**GUARDED, "max_steps": 2}))
    DivGuardTrainer(
        model=tiny_model(), args=args, train_dataset=TokenRows(), eval_dataset=TokenRows(rows=8, seed=1)
    ).train()
    # Whole pages of 4 kB, and one for the folder.
    pages = [-(-path.stat().st_size // 4096) for path in (folder / "checkpoint-2").iterdir()]
    return 4 * (sum(pages) + 1)


def complete_steps(folder: Path) -> list[int]:
    return [info.step for info in find_checkpoints(folder) if info.verdict.status == "complete"]


def filled(folder: Path, leave_kilobytes: int) -> Path:
    """Fill the disk of ``folder`` up to ``leave_kilobytes``; return the file that takes the room."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    ballast.write_bytes(b"\0" * max(0, free - leave_kilobytes * 1024))
    return ballast


class AtStep(TrainerCallback):
    def __init__(self, step: int, function: Callable[[], Any]) -> None:
        self._step, self._function = step, function

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self._function()


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.85])
def test_a_disk_that_is_full_in_the_middle_of_a_save_leaves_the_older_checkpoints(
    share: float, mode: str, kilobytes: int, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    with disk(tmp_path / "disk", 10 * kilobytes) as folder:
        make_trainer(folder / "out", **{**GUARDED, "max_steps": 2}).train()
        # What a checkpoint takes is known to the check before a save from the one before. A run that has just been
        # resumed has none, so that this one runs into the full disk.
        filled(folder, round(share * kilobytes))
        trainer = make_trainer(folder / "out", divguard_save_mode=mode, **GUARDED)
        with pytest.raises(CheckpointSaveError) as caught:
            trainer.train(resume_from_checkpoint=True)
        words = str(caught.value)
        assert "checkpoint-4 failed" in words
        assert "had been written" in words
        assert "are free in" in words
        assert "Complete checkpoints from before are untouched." in words
        assert names_in(folder / "out") == ["checkpoint-2"]
        assert verify_checkpoint(folder / "out" / "checkpoint-2").resumable


def test_too_little_room_is_noticed_before_anything_is_written(
    kilobytes: int, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    with disk(tmp_path / "disk", 10 * kilobytes) as folder:
        trainer = make_trainer(folder / "out", **GUARDED)
        trainer.add_callback(AtStep(3, lambda: filled(folder, kilobytes // 4)))
        with pytest.raises(CheckpointSaveError, match=r"MB must be free to write here, found .*MB") as caught:
            trainer.train()
        assert "Of this one 0.0 MB had been written" in str(caught.value)
        assert complete_steps(folder / "out") == [2]


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_training_goes_on_over_a_full_disk_if_asked_to_and_saves_again_when_there_is_room(
    mode: str,
    kilobytes: int,
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    our_log: pytest.LogCaptureFixture,
) -> None:
    with disk(tmp_path / "disk", 10 * kilobytes) as folder:
        trainer = make_trainer(
            folder / "out",
            divguard_save_mode=mode,
            divguard_on_save_error="continue",
            preserve_best_model=True,
            **GUARDED,
        )
        trainer.add_callback(AtStep(3, lambda: filled(folder, kilobytes // 2)))
        trainer.add_callback(AtStep(6, lambda: (folder / "ballast").unlink()))
        trainer.train()
        assert trainer.state.global_step == 8
        assert complete_steps(folder / "out") == [2, 8]
        assert names_in(folder / "out") == ["checkpoint-2", "checkpoint-8"]
        assert our_log.text.count("Training goes on without this checkpoint") == 2
        assert {entry.step for entry in trainer.best_checkpoints(5)} == {2, 8}
        assert trainer.state.best_model_checkpoint in {
            str(folder / "out" / f"checkpoint-{n}") for n in (2, 8)
        }


def test_a_failed_save_is_not_called_the_best(
    kilobytes: int, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    with disk(tmp_path / "disk", 10 * kilobytes) as folder:
        trainer = make_trainer(
            folder / "out",
            divguard_on_save_error="continue",
            metric_for_best_model="loss",
            eval_on_save=True,
            max_steps=4,
        )
        trainer.add_callback(AtStep(3, lambda: filled(folder, kilobytes // 2)))
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(folder / "out" / "checkpoint-2")


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_limit_on_the_size_of_files_leaves_the_older_checkpoints(
    mode: str, run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = run_ranks(
        scenarios.train_with_a_limit_on_file_sizes,
        output_dir=tmp_path / "out",
        from_step=4,
        largest=4096,
        divguard_save_mode=mode,
        logging_steps=100,
    )[0]
    assert outcome.error is not None
    assert outcome.error.startswith("CheckpointSaveError: ")
    assert "checkpoint-4 failed" in outcome.error
    assert names_in(tmp_path / "out") == ["checkpoint-2"]
    assert verify_checkpoint(tmp_path / "out" / "checkpoint-2").resumable


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_disk_that_becomes_read_only_leaves_the_older_checkpoints(
    mode: str, kilobytes: int, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    with disk(tmp_path / "disk", 10 * kilobytes) as folder:
        trainer = make_trainer(folder / "out", divguard_save_mode=mode, **GUARDED)
        trainer.add_callback(AtStep(3, lambda: make_read_only(folder / "out")))
        with pytest.raises(CheckpointSaveError, match=r"checkpoint-4 failed.*Read-only file system"):
            trainer.train()
        assert complete_steps(folder / "out") == [2]


def test_a_read_only_folder_is_refused_before_the_first_step(
    kilobytes: int, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    with disk(tmp_path / "disk", 10 * kilobytes) as folder:
        trainer = make_trainer(folder / "out", **GUARDED)
        mount("-o", "remount,ro", str(folder))
        with pytest.raises(CheckpointSaveError, match=r"Preparing .*out for checkpoints failed.*Read-only"):
            trainer.train()
        assert trainer.state.global_step == 0
