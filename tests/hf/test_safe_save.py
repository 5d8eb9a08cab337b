"""What a save publishes, what a resume takes, and what it says about those it passes over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import CheckpointError, NoCompleteCheckpointError
from hf_divguard.storage.checkpoints import find_checkpoints, verify_checkpoint
from hf_divguard.storage.manifest import read_manifest
from hf_divguard.storage.names import INCOMPLETE_NAME, MANIFEST_NAME, SIDECAR_NAME
from hf_divguard.storage.quarantine import quarantine
from tests.hf import scenarios
from tests.storage.conftest import damages, tree
from tests.tiny import names_in, same_weights, tiny_model, weights

GUARDED = {"eval_on_save": True, "max_steps": 6}


class Started(Exception):
    """Ends training where it starts: a test of the choice need not train."""


class EndAtTheStart(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise Started(state.global_step)


def start_of(make_trainer: Callable[..., Any], folder: Path, resume: Any = True, **options: Any) -> int:
    """Return the step that training resumes from."""
    trainer = make_trainer(folder, callbacks=[EndAtTheStart()], **{**GUARDED, **options})
    with pytest.raises(Started) as started:
        trainer.train(resume_from_checkpoint=resume)
    return int(started.value.args[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders with the checkpoints 2, 4 and 6: ``guarded``, with ``checksums``, and of the ``stock`` Trainer."""
    from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
    from tests.tiny import TokenRows, base_arguments

    root = tmp_path_factory.mktemp("saved")
    data = {"train_dataset": TokenRows(), "eval_dataset": TokenRows(rows=8, seed=1)}
    for name, options in (("guarded", {}), ("checksums", {"divguard_checksums": True})):
        args = DivGuardTrainingArguments(**base_arguments(root / name, **GUARDED, **options))
        DivGuardTrainer(model=tiny_model(), args=args, **data).train()
    args = TrainingArguments(**base_arguments(root / "stock", max_steps=6))
    Trainer(model=tiny_model(), args=args, **data).train()
    return {name: root / name for name in ("guarded", "checksums", "stock")}


def checkpoints_in(folder: Path) -> dict[str, Any]:
    """Return what stands in a run folder, down to each file, without the folder of events and lock."""
    return {name: tree(folder / name) for name in names_in(folder)}


def copy_of(saved: dict[str, Path], name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[name], tmp_path / name))


# ---- what is published


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_every_file_of_a_checkpoint_stands_in_its_manifest(
    mode: str, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    make_trainer(tmp_path / "out", divguard_save_mode=mode, max_steps=4).train()
    for step in (2, 4):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        manifest = read_manifest(folder)
        assert set(manifest.files) == {path.name for path in folder.iterdir()} - {MANIFEST_NAME}
        assert (manifest.step, manifest.world_size) == (step, 1)
        assert verify_checkpoint(folder).resumable
    assert names_in(tmp_path / "out") == ["checkpoint-2", "checkpoint-4"]


def test_no_reader_sees_a_part_of_a_checkpoint_while_it_is_written(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    seen = []

    class Look(TrainerCallback):
        def state_dict(self) -> dict[str, Any]:  # asked for between the writing and the manifest
            seen.append(sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")))
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    make_trainer(tmp_path / "out", divguard_save_mode="staged", max_steps=4, callbacks=[Look()]).train()
    assert seen[-1] == ["checkpoint-2"]


@pytest.mark.parametrize("mode", ["staged", "in_place", "auto"])
def test_a_run_that_was_cut_and_resumed_ends_with_the_weights_of_one_that_was_not(
    mode: str, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"divguard_save_mode": mode, "eval_on_save": True, "dropout": 0.1}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    cut = make_trainer(tmp_path / "cut", **options)
    cut.train(resume_from_checkpoint=True)
    assert same_weights(weights(whole.model), weights(cut.model))


def test_a_checkpoint_of_ours_can_be_resumed_by_the_stock_trainer(
    saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    stock = make_trainer(folder, trainer_class=Trainer, arguments_class=TrainingArguments, max_steps=8)
    stock.train(resume_from_checkpoint=True)
    assert stock.state.global_step == 8


def test_training_args_in_a_checkpoint_hold_the_users_own_limit(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    import torch

    make_trainer(tmp_path / "out", save_total_limit=3, max_steps=2, eval_on_save=True).train()
    args = torch.load(tmp_path / "out" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert args.save_total_limit == 3


# ---- what a resume takes


def damaged_files(kind: str) -> list[str]:
    trainer_files = [
        "config.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
    ]
    return trainer_files + ([MANIFEST_NAME, SIDECAR_NAME] if kind != "stock" else [])


CASES = [
    pytest.param(kind, name, how, id=f"{kind}, {name} {how}")
    for kind in ("guarded", "checksums", "stock")
    for name in damaged_files(kind)
    for how in ("removed", "emptied", "halved", "bit flipped")
    # A flipped bit shows in checksums alone, and a stock checkpoint is resumable without its arguments.
    if (how != "bit flipped" or kind == "checksums")
    and not (kind == "stock" and how == "removed" and name in ("training_args.bin", "config.json"))
]


@pytest.mark.parametrize(("kind", "name", "how"), CASES)
def test_a_damaged_checkpoint_is_passed_over_and_the_reason_told(
    kind: str,
    name: str,
    how: str,
    saved: dict[str, Path],
    tmp_path: Path,
    our_log: pytest.LogCaptureFixture,
) -> None:
    from hf_divguard.hf.ranks import Ranks
    from hf_divguard.hf.resume import choose_for_all

    folder = copy_of(saved, kind, tmp_path)
    damages()[how](folder / "checkpoint-6" / name)
    before = checkpoints_in(folder)
    assert choose_for_all(True, str(folder), Ranks(0, 1)) == str(folder / "checkpoint-4")
    said = [record.getMessage() for record in our_log.records]
    assert len(said) == 1
    assert said[0].startswith(f"Resuming from {folder / 'checkpoint-4'}; passed over checkpoint-6: ")
    assert name in said[0]
    assert "\n" not in said[0]
    assert checkpoints_in(folder) == before


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_with_the_same_weights(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"eval_on_save": True, "dropout": 0.1}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    damages()["halved"](tmp_path / "cut" / "checkpoint-8" / "optimizer.pt")
    damages()["removed"](tmp_path / "cut" / "checkpoint-6" / "rng_state.pth")
    cut = make_trainer(tmp_path / "cut", **options)
    cut.train(resume_from_checkpoint=True)
    assert same_weights(weights(whole.model), weights(cut.model))
    assert [info.verdict.status for info in find_checkpoints(tmp_path / "cut")] == ["complete"] * 4


@pytest.mark.parametrize("asked", [True, "latest", "best"])
def test_folders_of_which_none_is_complete_raise_an_error_that_names_each(
    asked: Any, saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    for step in (2, 4, 6):
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    before = checkpoints_in(folder)
    trainer = make_trainer(folder, **GUARDED)
    with pytest.raises(NoCompleteCheckpointError) as caught:
        trainer.train(resume_from_checkpoint=asked)
    if asked != "best":
        for step in (2, 4, 6):
            assert f"checkpoint-{step}: `optimizer.pt` is missing" in str(caught.value)
        assert "To start from scratch" in str(caught.value)
    assert checkpoints_in(folder) == before


def test_without_any_folder_the_stock_error_stands(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", **GUARDED)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)


def test_best_and_latest_name_checkpoints(
    saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    losses = {info.step: info.metric for info in find_checkpoints(folder)}
    best = min(losses, key=lambda step: losses[step] or 0.0)
    assert start_of(make_trainer, folder, "latest") == 6
    assert start_of(make_trainer, folder, "best") == best
    worst = max(losses, key=lambda step: losses[step] or 0.0)
    as_stock = {"metric_for_best_model": "loss", "greater_is_better": True}
    assert start_of(make_trainer, folder, "best", **as_stock) == worst
    assert start_of(make_trainer, folder, str(folder / "checkpoint-2")) == 2


def test_the_best_is_passed_over_when_it_is_broken(
    saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "checksums", tmp_path)
    first = start_of(make_trainer, folder, "best")
    damages()["bit flipped"](folder / f"checkpoint-{first}" / "model.safetensors")
    second = start_of(make_trainer, folder, "best")
    assert second != first


def test_a_broken_checkpoint_that_was_named_is_refused(
    saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    damages()["halved"](folder / "checkpoint-4" / "model.safetensors")
    trainer = make_trainer(folder, **GUARDED)
    with pytest.raises(CheckpointError, match=r"`model\.safetensors` is too short"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_a_quarantined_checkpoint_is_passed_over(
    saved: dict[str, Path],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    our_log: pytest.LogCaptureFixture,
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    quarantine(folder / "checkpoint-6", reason="the loss had left its path", onset_step=5)
    assert start_of(make_trainer, folder) == 4
    assert "passed over checkpoint-6" in our_log.text
    assert "The loss had left its path" in our_log.text


def test_the_newest_is_the_one_saved_last_not_the_one_of_the_highest_number(
    saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    trainer = make_trainer(folder, **{**GUARDED, "max_steps": 4, "save_total_limit": 2})
    trainer.train()  # anew, over the leftovers of a longer run
    assert {info.step for info in find_checkpoints(folder)} == {2, 4}
    assert start_of(make_trainer, folder, max_steps=8) == 4


def test_names_that_only_look_like_checkpoints_are_neither_resumed_nor_deleted(
    saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    elsewhere = Path(shutil.copytree(folder / "checkpoint-6", tmp_path / "elsewhere"))
    for name in ("checkpoint-best", "checkpoint-90.bak", "checkpoint-070", "checkpoint-80-merged"):
        shutil.copytree(folder / "checkpoint-6", folder / name)
    (folder / "checkpoint-5").write_text("a file")
    (folder / "checkpoint-60").symlink_to(elsewhere, target_is_directory=True)
    odd = {
        name: tree(folder / name)
        for name in names_in(folder)
        if name not in ("checkpoint-2", "checkpoint-4", "checkpoint-6")
    }
    outside = tree(elsewhere)
    trainer = make_trainer(folder, eval_on_save=True, max_steps=10, save_total_limit=1)
    assert start_of(make_trainer, folder) == 6
    trainer.train(resume_from_checkpoint=True)
    assert tree(elsewhere) == outside
    assert {name: tree(folder / name) for name in odd} == odd
    assert set(names_in(folder)) == {"checkpoint-10", *odd}


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_link_that_has_the_name_of_the_next_checkpoint_is_left_alone(
    kind: str, mode: str, make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / MANIFEST_NAME).write_text("precious")
    (tmp_path / "out").mkdir()
    name = tmp_path / "out" / "checkpoint-4"
    if kind == "file":
        name.write_text("precious")
    else:
        name.symlink_to(elsewhere, target_is_directory=True)
    trainer = make_trainer(tmp_path / "out", divguard_save_mode=mode, eval_on_save=True)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 failed.*needs this name for its folder"):
        trainer.train()
    assert (elsewhere / MANIFEST_NAME).read_text() == "precious"
    assert name.is_symlink() or name.read_text() == "precious"
    assert verify_checkpoint(tmp_path / "out" / "checkpoint-2").status == "complete"


def test_what_a_killed_save_left_whole_is_resumed_from(
    saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    staging = folder / "_divguard_staging"
    staging.mkdir()
    (folder / "checkpoint-6").rename(staging / "checkpoint-6")
    assert start_of(make_trainer, folder) == 6
    assert names_in(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("by_name", [False, True])
def test_what_a_killed_replacement_moved_aside_is_resumed_from(
    by_name: bool, saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    for step in (2, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    (folder / "checkpoint-6").rename(folder / "_divguard_replaced-6")
    resume = str(folder / "checkpoint-6") if by_name else True
    assert start_of(make_trainer, folder, resume) == 6


def test_a_checkpoint_of_the_stock_trainer_with_its_unfinished_marker_does_not_count(
    saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "stock", tmp_path)
    (folder / "checkpoint-6" / INCOMPLETE_NAME).write_text("Checkpoint started at step 6 and in progress...")
    assert start_of(make_trainer, folder, eval_on_save=False) == 4


def test_a_checkpoint_with_the_model_alone_is_resumed_only_if_there_is_no_better_and_with_a_word(
    saved: dict[str, Path],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    our_log: pytest.LogCaptureFixture,
) -> None:
    make_trainer(tmp_path / "out", **GUARDED, save_only_model=True).train()
    assert start_of(make_trainer, tmp_path / "out") == 6
    assert "training cannot go on from it" in our_log.text
    shutil.copytree(saved["guarded"] / "checkpoint-4", tmp_path / "out" / "checkpoint-4", dirs_exist_ok=True)
    assert start_of(make_trainer, tmp_path / "out") == 4


# ---- what is deleted


@pytest.mark.parametrize("options", [{}, {"preserve_best_model": True}], ids=["as stock", "best kept"])
def test_an_unfinished_folder_takes_no_place_of_a_complete_one(
    options: dict[str, Any], saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    shutil.move(folder / "checkpoint-6", folder / "checkpoint-7")
    trainer = make_trainer(folder, eval_on_save=True, max_steps=6, save_total_limit=2, **options)
    trainer.train(resume_from_checkpoint=True)
    complete = {info.step for info in find_checkpoints(folder) if info.verdict.status == "complete"}
    assert {4, 6} <= complete


def test_age_is_the_order_of_saving_not_the_time_of_change(
    saved: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    folder = copy_of(saved, "guarded", tmp_path)
    os.utime(folder / "checkpoint-2", (2e9, 2e9))
    make_trainer(folder, eval_on_save=True, max_steps=8, save_total_limit=2).train(
        resume_from_checkpoint=True
    )
    assert {info.step for info in find_checkpoints(folder)} == {6, 8}


def test_a_folder_that_cannot_be_deleted_does_not_end_the_run(
    saved: dict[str, Path],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    our_log: pytest.LogCaptureFixture,
) -> None:
    import hf_divguard.storage.deletion as deletion

    folder = copy_of(saved, "guarded", tmp_path)
    real_rename, real_unlink = os.rename, os.unlink
    stuck = str(folder.resolve() / "checkpoint-2")

    def rename(source: Any, target: Any) -> None:
        if str(source) == stuck:
            raise PermissionError(13, "held by another program", stuck)
        real_rename(source, target)

    def unlink(path: Any, **kwargs: Any) -> None:
        if str(path).startswith(stuck):
            raise PermissionError(13, "held by another program", str(path))
        real_unlink(path, **kwargs)

    assert deletion.os is os
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "unlink", unlink)
        trainer = make_trainer(folder, eval_on_save=True, max_steps=10, save_total_limit=1)
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10
    assert "checkpoint-2 could not be deleted" in our_log.text
    assert {info.step for info in find_checkpoints(folder)} == {2, 10}


# ---- saving a step again


@pytest.mark.parametrize(
    ("mode", "moment"),
    [
        ("staged", "host wrote"),
        ("staged", "manifest written"),
        ("staged", "old checkpoint moved aside"),
        ("staged", "checkpoint published"),
        ("staged", None),
        ("in_place", "host wrote"),
        ("in_place", None),
    ],
)
def test_saving_a_step_again_never_leaves_the_run_without_a_checkpoint(
    mode: str,
    moment: str | None,
    run_ranks: Callable[..., Any],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
) -> None:
    outcome = run_ranks(
        scenarios.kill_during_a_second_save, output_dir=tmp_path / "out", save_mode=mode, moment=moment
    )
    # In place the step is not written again.
    expected = None if (moment, mode) == ("host wrote", "in_place") else "it ended with -9"
    assert outcome[0].error == expected, outcome[0].log
    assert start_of(make_trainer, tmp_path / "out", max_steps=4) == 2
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.parametrize("metric", [0.5, float("nan"), None])
def test_the_saved_state_of_the_host_is_what_it_would_write_itself(
    metric: float | None, tmp_path: Path
) -> None:
    from transformers import TrainerState

    from hf_divguard.hf.host import rewrite_best

    state = TrainerState(global_step=4, log_history=[{"step": 4, "note": 'a "best_metric": 1,\n'}])
    state.save_to_json(str(tmp_path / "written"))
    state.best_metric, state.best_global_step, state.best_model_checkpoint = (
        metric,
        4,
        'out/a "name"/checkpoint-4',
    )
    rewrite_best(state, tmp_path / "written")
    state.save_to_json(str(tmp_path / "expected"))
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()
    (tmp_path / "written").write_text('{"of": "another form"}')
    rewrite_best(state, tmp_path / "written")
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()
