"""A disk that does not answer for a moment is no reason to delete a checkpoint, or to start from scratch."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from hf_divguard.errors import CheckpointError
from hf_divguard.storage.checkpoints import find_checkpoints, latest_complete_checkpoint, verify_checkpoint
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.names import MANIFEST_NAME, REPLACED_PREFIX, SIDECAR_NAME, STAGING_NAME
from hf_divguard.storage.resume_state import resume_state
from hf_divguard.storage.staging import recover, staging_folder

from .conftest import certify, records_of, small_checkpoint, tree
from .disk_errors import PASSING, disk_error


def make(run: Path, metrics: dict[int, float]) -> None:
    for place, (step, metric) in enumerate(metrics.items(), start=1):
        certify(
            small_checkpoint(run / f"checkpoint-{step}"),
            sequence=place,
            metric_name="eval_loss",
            metric=metric,
            greater_is_better=False,
            records=records_of(*list(metrics)[:place]),
            lineage=((1, place),),
        )


def status(folder: Path, **options: bool) -> str:
    return verify_checkpoint(folder, **options).status


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize(
    ("where", "calls"),
    [
        (MANIFEST_NAME, ("open",)),
        ("weights.dat", ("stat",)),
        ("checkpoint-1", ("stat",)),
        ("weights.dat", ("open",)),
    ],
)
def test_a_certified_checkpoint_that_cannot_be_read_is_unreadable(
    where: str, calls: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    folder = certify(small_checkpoint(tmp_path / "checkpoint-1"), checksums=True)
    with disk_error(getattr(errno, name), where, calls):
        assert status(folder) == "unreadable"
    assert status(folder) == "complete"


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize(
    ("where", "calls"),
    [
        (SIDECAR_NAME, ("open",)),
        ("model.safetensors", ("open",)),
        ("optimizer.pt", ("open",)),
        ("trainer_state.json", ("open",)),
        ("checkpoint-4", ("scandir",)),
    ],
)
def test_a_stock_checkpoint_that_cannot_be_read_is_unreadable(
    where: str, calls: tuple[str, ...], name: str, run_dir: Path
) -> None:
    with disk_error(getattr(errno, name), where, calls):
        assert status(run_dir / "checkpoint-4") == "unreadable"
    assert status(run_dir / "checkpoint-4") == "complete"


def test_a_read_error_that_passes_at_once_is_not_even_seen(tmp_path: Path) -> None:
    make(tmp_path, {10: 0.3, 20: 0.2})
    with disk_error(errno.EIO, f"checkpoint-10/{MANIFEST_NAME}", times=1) as failed:
        assert [each.verdict.status for each in find_checkpoints(tmp_path)] == ["complete", "complete"]
    assert failed


def test_rotation_never_deletes_what_it_could_not_read_nor_a_good_one_for_it(tmp_path: Path) -> None:
    make(tmp_path, {10: 0.1, 20: 0.4, 30: 0.3, 40: 0.2})
    with disk_error(errno.EIO, f"checkpoint-10/{MANIFEST_NAME}"):
        ledger = CheckpointLedger.read(str(tmp_path), str(tmp_path / "checkpoint-40"), "eval_loss")
    assert ledger.unreadable == {10}
    assert [each.step for each in ledger.best(False)] == [40, 30, 20]
    for limit in (1, 2, 3):
        for step in (50, 60):
            ledger.add(step, 0.9)
        assert 10 not in ledger.to_delete(limit, 1, False)
        assert 10 not in ledger.to_delete_as_stock(limit, 40)
        assert 40 not in ledger.to_delete(limit, 1, False)


def test_an_unreadable_newest_checkpoint_does_not_evict_a_good_one(tmp_path: Path) -> None:
    make(tmp_path, {10: 0.1, 20: 0.4, 30: 0.3})
    with disk_error(errno.EIO, f"checkpoint-30/{MANIFEST_NAME}"):
        ledger = CheckpointLedger.read(str(tmp_path), None, "eval_loss")
    assert ledger.to_delete(2, 1, False) == []
    assert ledger.to_delete_as_stock(2, None) == []


def test_what_was_unreadable_is_judged_again_and_is_the_best_as_before(tmp_path: Path) -> None:
    make(tmp_path, {10: 0.1, 20: 0.4, 30: 0.3})
    with disk_error(errno.ESTALE, f"checkpoint-10/{MANIFEST_NAME}"):
        ledger = CheckpointLedger.read(str(tmp_path), str(tmp_path / "checkpoint-30"), "eval_loss")
        assert ledger.judge_again() == []
    assert ledger.judge_again() == [10]
    assert [each.step for each in ledger.best(False)] == [10, 30, 20]
    assert [record.step for record in ledger.records] == [10, 20, 30]


def test_a_save_gets_no_number_that_an_unreadable_one_may_have(tmp_path: Path) -> None:
    make(tmp_path, {10: 0.1, 20: 0.4, 30: 0.3})
    with disk_error(errno.EIO, f"checkpoint-30/{MANIFEST_NAME}"):
        ledger = CheckpointLedger.read(str(tmp_path), str(tmp_path / "checkpoint-20"), "eval_loss")
    assert ledger.add(25, None).sequence > 3


def test_the_latest_one_is_taken_beside_unreadable_ones_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, {10: 0.1, 20: 0.4})
    with disk_error(errno.EACCES, f"checkpoint-20/{MANIFEST_NAME}"), caplog.at_level(logging.WARNING):
        latest = latest_complete_checkpoint(tmp_path)
    assert latest is not None
    assert latest.step == 10
    assert "checkpoint-20 is passed over" in caplog.text
    assert "Permission denied" in caplog.text


def test_none_is_never_the_answer_where_all_are_unreadable(tmp_path: Path) -> None:
    make(tmp_path, {10: 0.1, 20: 0.4})
    with disk_error(errno.ESTALE, "divguard_"), pytest.raises(CheckpointError, match="2 cannot be read"):
        latest_complete_checkpoint(tmp_path)


@pytest.mark.parametrize("where", ["staged", "aside", "final"])
def test_recovery_leaves_what_it_cannot_read(where: str, tmp_path: Path) -> None:
    make(tmp_path, {10: 0.1})
    kept = tmp_path / "checkpoint-20"
    certify(small_checkpoint(kept), sequence=2)
    if where == "staged":
        staging_folder(tmp_path).mkdir()
        shutil.move(kept, staging_folder(tmp_path) / "checkpoint-20")
        part = f"{STAGING_NAME}/checkpoint-20/{MANIFEST_NAME}"
    else:
        shutil.copytree(kept, tmp_path / f"{REPLACED_PREFIX}20")
        part = (
            f"{REPLACED_PREFIX}20/{MANIFEST_NAME}" if where == "aside" else f"checkpoint-20/{MANIFEST_NAME}"
        )
    before = tree(tmp_path)
    with disk_error(errno.EIO, part):
        words = recover(tmp_path)
    assert tree(tmp_path) == before
    assert len(words) == 1
    assert "cannot be read" in words[0]
    recover(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-20"]


# ---- is there something to resume?


def test_an_empty_or_missing_folder_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for folder in (tmp_path, tmp_path / "missing"):
        state = resume_state(folder)
        assert (state.status, state.checkpoint) == ("nothing", None)


def test_the_newest_resumable_checkpoint_is_found(run_dir: Path) -> None:
    certify(run_dir / "checkpoint-2", sequence=1, checksums=True)
    certify(run_dir / "checkpoint-4", sequence=2, checksums=True)
    state = resume_state(run_dir)
    assert state.status == "found"
    assert state.checkpoint is not None
    assert state.checkpoint.path == str(run_dir / "checkpoint-4")
    data = bytearray((run_dir / "checkpoint-4" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (run_dir / "checkpoint-4" / "model.safetensors").write_bytes(data)
    state = resume_state(run_dir)
    assert state.checkpoint is not None
    assert state.checkpoint.step == 2
    assert [each.step for each in state.passed_over] == [4]


def test_a_model_alone_is_resumed_only_where_there_is_no_more(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "only_model", tmp_path / "run"))
    state = resume_state(run)
    assert (state.status, state.checkpoint and state.checkpoint.step) == ("found", 4)


def _only_incomplete(run: Path) -> None:
    (certify(small_checkpoint(run / "checkpoint-1")) / MANIFEST_NAME).unlink()


def _staged(run: Path) -> None:
    certify(small_checkpoint(staging_folder(run) / "checkpoint-1"))


def _aside(run: Path) -> None:
    certify(small_checkpoint(run / "checkpoint-1")).rename(run / f"{REPLACED_PREFIX}1")


def _link_to_nothing(run: Path) -> None:
    (run / "checkpoint-1").symlink_to("gone")


@pytest.mark.parametrize("what", [_only_incomplete, _staged, _aside, _link_to_nothing])
def test_what_is_there_and_cannot_be_resumed_is_not_nothing(what: object, tmp_path: Path) -> None:
    what(tmp_path)  # type: ignore[operator]
    state = resume_state(tmp_path)
    assert (state.status, state.checkpoint) == ("unknown", None)
    assert "checkpoint-1" in state.reason or f"{REPLACED_PREFIX}1" in state.reason


@pytest.mark.parametrize(
    ("part", "calls"), [("run", ("scandir",)), ("run", ("stat",)), (MANIFEST_NAME, ("open",))]
)
def test_a_folder_that_cannot_be_read_is_not_nothing(
    part: str, calls: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    make(run, {10: 0.1})
    with disk_error(errno.EIO, part, calls):
        state = resume_state(run)
    assert state.status == "unknown"
    assert "Input/output error" in state.reason
