"""An older checkpoint of a step stays until the new one of the same step is complete, also in place."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.storage.integrity import verify_checkpoint
from hf_divguard.storage.names import MANIFEST_NAME
from hf_divguard.storage.replacing import aside_of, finish_move, remove_aside, set_aside
from hf_divguard.storage.staging import recover

from .conftest import certify, small_checkpoint


@pytest.fixture(params=["folders are renamed", "folders are copied"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run folder with one checkpoint, on a file system of each kind."""
    folder = small_checkpoint(tmp_path / "checkpoint-20")
    (folder / "global_step20").mkdir()
    (folder / "global_step20" / "shard.pt").write_bytes(b"shard")
    os.utime(certify(folder), (5, 5))
    if request.param == "folders are copied":
        rename = os.rename

        def refuse(source: Any, target: Any) -> None:
            if os.path.isdir(source):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            rename(source, target)

        monkeypatch.setattr(os, "rename", refuse)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_what_was_set_aside_comes_back_as_it_was(run: Path) -> None:
    before = contents(run / "checkpoint-20")
    set_aside(run, 20, flush=True)
    assert os.listdir(run) == [aside_of(run, 20).name]
    assert len(list(finish_move(aside_of(run, 20)))) == 1
    assert os.listdir(run) == ["checkpoint-20"]
    assert contents(run / "checkpoint-20") == before
    assert os.stat(run / "checkpoint-20").st_mtime == 5


def test_after_a_kill_in_the_new_save_the_older_one_has_its_name_again(run: Path) -> None:
    before = contents(run / "checkpoint-20")
    set_aside(run, 20)
    (run / "checkpoint-20").mkdir()
    (run / "checkpoint-20" / "model.safetensors").write_bytes(b"half")
    assert any("has its name back" in line for line in recover(run))
    assert os.listdir(run) == ["checkpoint-20"]
    assert contents(run / "checkpoint-20") == before


def test_after_the_new_one_is_complete_the_older_one_goes(run: Path) -> None:
    set_aside(run, 20)
    certify(small_checkpoint(run / "checkpoint-20"))
    remove_aside(run, 20)
    assert os.listdir(run) == ["checkpoint-20"]


def test_one_that_does_not_count_is_not_kept(run: Path) -> None:
    (run / "checkpoint-20" / "global_step20" / "shard.pt").unlink()
    set_aside(run, 20)
    assert os.listdir(run) == []


def test_without_room_for_a_copy_the_checkpoint_keeps_its_name(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        set_aside(run, 20)
    assert os.listdir(run) == ["checkpoint-20"]
    assert (run / "checkpoint-20" / MANIFEST_NAME).exists()
    assert verify_checkpoint(run / "checkpoint-20").status == "complete"
