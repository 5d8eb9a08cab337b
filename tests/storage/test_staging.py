from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_divguard.storage.checkpoints import find_checkpoints, latest_complete_checkpoint, verify_checkpoint
from hf_divguard.storage.names import DELETING_PREFIX, INCOMPLETE_NAME, REPLACED_PREFIX, STAGING_NAME
from hf_divguard.storage.staging import (
    discard_staging,
    folders_can_be_renamed,
    publish,
    recover,
    staging_folder,
)

from .conftest import certify, small_checkpoint, tree
from .killing import killed_before_call


def staged(run: Path, step: int, *, weight: bytes = b"new", sequence: int = 9) -> Path:
    return certify(
        small_checkpoint(staging_folder(run) / f"checkpoint-{step}", weight=weight), sequence=sequence
    )


def weight(run: Path, step: int) -> bytes:
    return (run / f"checkpoint-{step}" / "weights.dat").read_bytes()


@pytest.mark.parametrize("flush", [False, True])
def test_a_published_checkpoint_has_its_name_and_nothing_is_left(flush: bool, tmp_path: Path) -> None:
    staged(tmp_path, 20)
    assert publish(tmp_path, 20, flush=flush) == tmp_path / "checkpoint-20"
    assert os.listdir(tmp_path) == ["checkpoint-20"]
    assert verify_checkpoint(tmp_path / "checkpoint-20").status == "complete"


def test_a_step_that_is_saved_again_replaces_the_older_one(tmp_path: Path) -> None:
    certify(small_checkpoint(tmp_path / "checkpoint-20", weight=b"old"))
    staged(tmp_path, 20)
    publish(tmp_path, 20)
    assert os.listdir(tmp_path) == ["checkpoint-20"]
    assert weight(tmp_path, 20) == b"new"


def test_nothing_staged_and_a_staged_link_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="must be a real folder"):
        publish(tmp_path, 20)
    small_checkpoint(tmp_path / "elsewhere" / "checkpoint-20")
    staging_folder(tmp_path).mkdir()
    (staging_folder(tmp_path) / "checkpoint-20").symlink_to(tmp_path / "elsewhere" / "checkpoint-20")
    before = tree(tmp_path)
    with pytest.raises(NotADirectoryError, match="must be a real folder"):
        publish(tmp_path, 20)
    assert tree(tmp_path) == before


def test_a_file_or_link_with_the_name_is_not_replaced(tmp_path: Path) -> None:
    staged(tmp_path, 20)
    (tmp_path / "checkpoint-20").write_text("a file")
    with pytest.raises(NotADirectoryError, match="Only a real folder"):
        publish(tmp_path, 20)
    assert (tmp_path / "checkpoint-20").read_text() == "a file"
    assert verify_checkpoint(staging_folder(tmp_path) / "checkpoint-20").status == "complete"


def test_a_move_that_fails_gives_the_old_one_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify(small_checkpoint(tmp_path / "checkpoint-20", weight=b"old"))
    staged(tmp_path, 20)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if STAGING_NAME in os.fspath(source):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path, 20)
    assert weight(tmp_path, 20) == b"old"
    assert verify_checkpoint(tmp_path / "checkpoint-20").status == "complete"


def _target(run: Path, kind: str, stock: Path) -> None:
    """Put what ``kind`` says under the name that will be published."""
    if kind == "stock":
        shutil.copytree(stock, run / "checkpoint-4")
    elif kind != "nothing":
        folder = certify(small_checkpoint(run / "checkpoint-4", weight=b"old"), sequence=2)
        if kind == "unfinished":
            (folder / INCOMPLETE_NAME).write_text("in progress")
        elif kind == "sentinel alone":
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / INCOMPLETE_NAME).write_text("in progress")


TARGETS = ["nothing", "certified", "stock", "unfinished", "sentinel alone"]


@pytest.mark.parametrize("kind", TARGETS)
def test_publishing_and_recovering_killed_before_any_system_call_lose_nothing(
    kind: str, trained: Path, tmp_path: Path
) -> None:
    """Kill the publishing before each call, then each recovery before each call, then let one finish."""
    start = tmp_path / "start"
    certify(small_checkpoint(start / "checkpoint-2"))
    _target(start, kind, trained / "full" / "checkpoint-4")
    staged(start, 4)
    moments = itertools.count()
    for number in itertools.count():
        run = Path(shutil.copytree(start, tmp_path / f"publish-{number}"))
        killed = killed_before_call(number, lambda run=run: publish(run, 4))
        for again in itertools.count():
            copy = Path(shutil.copytree(run, tmp_path / f"recover-{number}-{again}"))
            killed_again = killed_before_call(again, lambda copy=copy: recover(copy))
            next(moments)
            _one_whole_checkpoint_is_findable(copy, kind)
            shutil.rmtree(copy)
            if not killed_again:
                break
        if not killed:
            assert weight(run, 4) == b"new"
            break
    assert next(moments) > 3


def _one_whole_checkpoint_is_findable(run: Path, kind: str) -> None:
    recover(run)
    assert sorted(os.listdir(run)) == ["checkpoint-2", "checkpoint-4"]
    assert recover(run) == []
    found = verify_checkpoint(run / "checkpoint-4")
    assert found.status == "complete"
    whole = {"nothing": {b"new"}, "certified": {b"new", b"old"}}.get(kind, {b"new", None})
    path = run / "checkpoint-4" / "weights.dat"
    assert (path.read_bytes() if path.exists() else None) in whole
    latest = latest_complete_checkpoint(run)
    assert latest is not None
    assert latest.step == 4
    assert verify_checkpoint(run / "checkpoint-2").status == "complete"


def test_an_unfinished_staged_checkpoint_is_removed_and_said(tmp_path: Path) -> None:
    folder = staged(tmp_path, 20)
    (folder / "weights.dat").unlink()
    certify(small_checkpoint(tmp_path / "checkpoint-10"))
    assert recover(tmp_path) == ["Removed the unfinished checkpoint-20."]
    assert os.listdir(tmp_path) == ["checkpoint-10"]


def test_a_whole_staged_checkpoint_gets_its_name_and_it_is_said(tmp_path: Path) -> None:
    staged(tmp_path, 20)
    assert recover(tmp_path) == [
        "checkpoint-20 was saved completely when the last run was killed; it has its name now."
    ]
    assert verify_checkpoint(tmp_path / "checkpoint-20").status == "complete"


@pytest.mark.parametrize(
    ("there", "kept"), [("newer", b"old"), ("older", b"new"), ("other run", b"old"), ("quarantined", b"new")]
)
def test_a_staged_checkpoint_replaces_only_what_is_older_or_does_not_count(
    there: str, kept: bytes, tmp_path: Path
) -> None:
    from hf_divguard.storage.manifest import build_manifest, write_manifest
    from hf_divguard.storage.quarantine import quarantine

    folder = certify(
        small_checkpoint(tmp_path / "checkpoint-20", weight=b"old"), sequence=9 if there == "older" else 8
    )
    staged(tmp_path, 20, sequence={"newer": 5, "older": 10}.get(there, 9))
    if there == "other run":
        write_manifest(folder, build_manifest(folder, step=20, run_id="other", sequence=1, world_size=1))
    if there == "quarantined":
        quarantine(folder, reason="It diverged.")
    recover(tmp_path)
    assert weight(tmp_path, 20) == kept
    assert os.listdir(tmp_path) == ["checkpoint-20"]


def test_a_replaced_checkpoint_without_a_successor_gets_its_name_back(tmp_path: Path, run_dir: Path) -> None:
    (run_dir / "checkpoint-4").rename(run_dir / f"{REPLACED_PREFIX}4")
    words = recover(run_dir)
    assert len(words) == 1
    assert "has its name back" in words[0]
    assert latest_complete_checkpoint(run_dir) is not None
    assert [info.step for info in find_checkpoints(run_dir)] == [2, 4]


def test_a_replaced_checkpoint_that_is_whole_wins_over_a_half_successor(run_dir: Path) -> None:
    (run_dir / "checkpoint-4").rename(run_dir / f"{REPLACED_PREFIX}4")
    (run_dir / "checkpoint-4").mkdir()
    (run_dir / "checkpoint-4" / INCOMPLETE_NAME).write_text("in progress")
    recover(run_dir)
    assert verify_checkpoint(run_dir / "checkpoint-4").status == "complete"
    assert sorted(os.listdir(run_dir)) == ["checkpoint-2", "checkpoint-4"]


def test_unfinished_files_of_ours_are_removed_without_touching_the_time_of_change(tmp_path: Path) -> None:
    folder = certify(small_checkpoint(tmp_path / "checkpoint-20"))
    (folder / "_divguard_tmp-x").write_text("half")
    os.utime(folder, (5, 5))
    (tmp_path / "_divguard_tmp-y").write_text("half")
    assert len(recover(tmp_path)) == 2
    assert os.stat(folder).st_mtime == 5
    assert verify_checkpoint(folder).status == "complete"


def test_only_names_of_ours_are_touched_and_no_link_is_followed(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    small_checkpoint(outside / "checkpoint-1")
    run.mkdir()
    for name in (
        "divguard",
        "_divguard_other",
        f"{REPLACED_PREFIX}x",
        f"{REPLACED_PREFIX}01",
        f"{DELETING_PREFIX}",
        "checkpoint-best",
        "checkpoint-7",
    ):
        shutil.copytree(outside, run / name)
    before = tree(tmp_path)
    assert recover(run) == []
    assert tree(tmp_path) == before
    for name in (STAGING_NAME, f"{REPLACED_PREFIX}5", f"{DELETING_PREFIX}6"):
        (run / name).symlink_to(outside)
    recover(run)
    assert {name: value[::2] for name, value in tree(tmp_path).items()} == {
        name: value[::2] for name, value in before.items()
    }


def test_what_cannot_be_removed_is_said_and_does_not_stop_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_checkpoint(tmp_path / f"{DELETING_PREFIX}5")
    certify(small_checkpoint(tmp_path / "checkpoint-1"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    words = recover(tmp_path)
    assert len(words) == 1
    assert "Could not remove" in words[0]
    assert "Permission denied" in words[0]


def test_discarding_the_staging_folder_removes_it_or_a_link_of_its_name_alone(tmp_path: Path) -> None:
    staged(tmp_path / "run", 20)
    discard_staging(tmp_path / "run")
    discard_staging(tmp_path / "run")
    small_checkpoint(tmp_path / "outside" / "checkpoint-1")
    staging_folder(tmp_path / "run").symlink_to(tmp_path / "outside")
    discard_staging(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []
    assert os.listdir(tmp_path / "outside") == ["checkpoint-1"]


def test_the_test_for_renaming_says_yes_here_and_leaves_nothing(tmp_path: Path) -> None:
    assert folders_can_be_renamed(tmp_path)
    assert os.listdir(tmp_path) == []


def _refusing(_: Callable[..., None]) -> Callable[..., None]:
    def rename(*_arguments: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    return rename


def _copying(_: Callable[..., None]) -> Callable[..., None]:
    def rename(source: Path, target: Path) -> None:
        shutil.copytree(source, target)

    return rename


def _silent(_: Callable[..., None]) -> Callable[..., None]:
    return lambda source, target: None


@pytest.mark.parametrize("fault", [_refusing, _copying, _silent])
def test_a_file_system_that_does_not_move_folders_is_found_out(
    fault: Callable[..., Callable[..., None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "rename", fault(os.rename))
    assert not folders_can_be_renamed(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_cannot_be_renamed_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not folders_can_be_renamed(tmp_path / "file")


_PUBLISHER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.storage.conftest import certify, small_checkpoint
from hf_divguard.storage.staging import publish, staging_folder
run = Path(sys.argv[1])
print("ready", flush=True)
for sequence in range(2, 10_000):
    certify(small_checkpoint(staging_folder(run) / "checkpoint-4", weight=str(sequence).encode()), sequence=sequence)
    publish(run, 4)
"""


def test_a_step_saved_again_and_again_survives_real_sigkills(tmp_path: Path) -> None:
    run = tmp_path / "run"
    certify(small_checkpoint(run / "checkpoint-4", weight=b"1"))
    latest = 0
    for trial in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", _PUBLISHER, run, Path(__file__).parents[2]],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.03 + 0.017 * trial)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        recover(run)
        assert os.listdir(run) == ["checkpoint-4"]
        assert verify_checkpoint(run / "checkpoint-4").status == "complete"
        latest = max(latest, int(weight(run, 4)))
    assert latest > 2
