from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_divguard.storage.checkpoints import find_checkpoints, latest_complete_checkpoint, verify_checkpoint
from hf_divguard.storage.deletion import delete_checkpoint, remove_tree
from hf_divguard.storage.names import DELETING_PREFIX
from hf_divguard.storage.staging import recover

from .conftest import certify, small_checkpoint, tree
from .killing import killed_before_call


def test_a_deleted_checkpoint_is_gone_and_nothing_else(run_dir: Path) -> None:
    (run_dir / "notes.txt").write_text("keep")
    kept = tree(run_dir / "checkpoint-4")
    delete_checkpoint(run_dir / "checkpoint-2", run_dir)
    assert sorted(os.listdir(run_dir)) == ["checkpoint-4", "notes.txt"]
    assert tree(run_dir / "checkpoint-4") == kept


def test_deleting_twice_is_fine(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "checkpoint-2")
    for _ in range(2):
        delete_checkpoint(tmp_path / "checkpoint-2", tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-best",
        "checkpoint-10.bak",
        "checkpoint-010",
        "checkpoint-",
        "checkpoint-5",
        "checkpoint-6",
        "x",
    ],
)
def test_what_is_no_checkpoint_folder_is_refused_and_stays(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small_checkpoint(tmp_path / "elsewhere" / "checkpoint-1")
    for other in ("checkpoint-best", "checkpoint-10.bak", "checkpoint-010", "checkpoint-", "x"):
        shutil.copytree(tmp_path / "elsewhere", run / other)
    (run / "checkpoint-5").write_text("a file")
    (run / "checkpoint-6").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"must|[Oo]nly"):
        delete_checkpoint(run / name, run)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "path",
    ["other/checkpoint-1", "run/sub/checkpoint-2", "run/../other/checkpoint-1", "run/link/checkpoint-1"],
)
def test_a_checkpoint_of_another_folder_is_refused_and_stays(path: str, tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "other" / "checkpoint-1")
    small_checkpoint(tmp_path / "run" / "sub" / "checkpoint-2")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "other")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="directly in"):
        delete_checkpoint(tmp_path / path, tmp_path / "run")
    assert tree(tmp_path) == before


def test_an_output_folder_reached_through_a_link_is_the_same_folder(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "real" / "checkpoint-1")
    (tmp_path / "link").symlink_to("real")
    delete_checkpoint(tmp_path / "link" / "checkpoint-1", tmp_path / "real")
    assert os.listdir(tmp_path / "real") == []


def test_links_inside_a_checkpoint_are_removed_and_not_followed(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "run" / "checkpoint-1")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep")
    (folder / "to_folder").symlink_to(tmp_path / "precious")
    (folder / "to_file").symlink_to(tmp_path / "precious" / "file")
    delete_checkpoint(folder, tmp_path / "run")
    assert (tmp_path / "precious" / "file").read_text() == "keep"
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize("renames", [True, False])
@pytest.mark.parametrize("certified", [True, False])
def test_killed_before_any_system_call_no_half_checkpoint_counts(
    certified: bool, renames: bool, run_dir: Path, tmp_path: Path
) -> None:
    if certified:
        certify(run_dir / "checkpoint-2", sequence=1)
        certify(run_dir / "checkpoint-4", sequence=2)
    number, killed = 0, True
    while killed:
        run = Path(shutil.copytree(run_dir, tmp_path / f"run-{number}"))
        whole = tree(run / "checkpoint-4")
        killed = killed_before_call(
            number, lambda run=run: delete_checkpoint(run / "checkpoint-4", run), renames=renames
        )
        left = run / "checkpoint-4"
        if left.exists() and tree(left) != whole:
            assert verify_checkpoint(left).status == "incomplete"
            assert not renames
        expected = 4 if left.exists() and tree(left) == whole else 2
        latest = latest_complete_checkpoint(run)
        assert latest is not None
        assert latest.step == expected
        recover(run)
        delete_checkpoint(run / "checkpoint-4", run)
        assert os.listdir(run) == ["checkpoint-2"]
        number += 1
    assert number > 8


_DELETER = """
import os, sys, time
from hf_divguard.storage.deletion import delete_checkpoint
real = os.unlink
def slow(*arguments):
    time.sleep(0.002)
    real(*arguments)
os.unlink = slow
if sys.argv[2] == "no":
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")
    os.rename = refuse
print("ready", flush=True)
delete_checkpoint(os.path.join(sys.argv[1], "checkpoint-4"), sys.argv[1])
"""


@pytest.mark.parametrize("renames", ["yes", "no"])
def test_a_removal_cut_short_by_a_real_sigkill_leaves_nothing_that_counts(
    renames: str, run_dir: Path, tmp_path: Path
) -> None:
    chance = random.Random(0)
    half_deleted = 0
    for trial in range(12):
        run = Path(shutil.copytree(run_dir, tmp_path / f"run-{trial}"))
        for number in range(20):
            (run / "checkpoint-4" / f"extra-{number}.bin").write_bytes(b"x")
        before = set(os.listdir(run / "checkpoint-4"))
        process = subprocess.Popen(
            [sys.executable, "-c", _DELETER, run, renames], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = run / "checkpoint-4"
        remaining = set(os.listdir(left)) if left.exists() else set()
        partly = bool(remaining) and remaining != before
        half_deleted += partly or any(name.startswith(DELETING_PREFIX) for name in os.listdir(run))
        if partly:
            assert verify_checkpoint(left).status == "incomplete"
        assert all(info.step == 2 for info in find_checkpoints(run) if info.verdict.status == "complete") or (
            remaining == before
        )
        recover(run)
        delete_checkpoint(left, run)
        assert os.listdir(run) == ["checkpoint-2"]
    assert half_deleted >= 3, "the kills came too early or too late to show anything"


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EBUSY])
def test_a_folder_that_is_busy_for_a_moment_is_tried_again(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_checkpoint(tmp_path / "checkpoint-1")
    real, calls = os.rmdir, []

    def rmdir(path: str) -> None:
        calls.append(path)
        if len(calls) < 3:
            raise OSError(code, os.strerror(code))
        real(path)

    monkeypatch.setattr(os, "rmdir", rmdir)
    delete_checkpoint(tmp_path / "checkpoint-1", tmp_path)
    assert os.listdir(tmp_path) == []


def test_files_that_another_process_removes_meanwhile_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_checkpoint(tmp_path / "checkpoint-1")
    real = os.unlink

    def unlink(path: str) -> None:
        real(path)
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    delete_checkpoint(tmp_path / "checkpoint-1", tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_real_failure_is_raised_and_the_rest_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify(small_checkpoint(tmp_path / "checkpoint-1"))
    real = os.unlink

    def unlink(path: str) -> None:
        if "weights" in os.fspath(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(OSError, match="Input/output error"):
        delete_checkpoint(tmp_path / "checkpoint-1", tmp_path)
    assert find_checkpoints(tmp_path) == []
    monkeypatch.undo()
    assert recover(tmp_path) == ["Removed what was left of the deleted checkpoint-1."]
    assert os.listdir(tmp_path) == []


def test_a_manifest_that_cannot_be_removed_keeps_the_files_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = certify(small_checkpoint(tmp_path / "checkpoint-1"))
    before = tree(folder)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Read-only"):
        delete_checkpoint(folder, tmp_path)
    assert tree(folder) == before
    assert verify_checkpoint(folder).status == "complete"


def test_two_processes_that_delete_the_same_checkpoint_both_end_well(tmp_path: Path) -> None:
    for trial in range(5):
        run = tmp_path / f"run-{trial}"
        folder = small_checkpoint(run / "checkpoint-4")
        for number in range(300):
            (folder / f"{number}.bin").write_bytes(b"x")
        code = (
            "import sys; from hf_divguard.storage.deletion import delete_checkpoint; sys.stdin.readline(); "
            f"delete_checkpoint({os.fspath(folder)!r}, {os.fspath(run)!r})"
        )
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            assert process.communicate(timeout=30)[1] == ""
        assert os.listdir(run) == []


def test_removing_a_file_or_a_missing_tree_is_fine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    remove_tree(tmp_path / "file")
    remove_tree(tmp_path / "file")
    assert os.listdir(tmp_path) == []
