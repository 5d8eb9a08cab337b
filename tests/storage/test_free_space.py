from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from hf_divguard.storage.free_space import free_bytes, require_free_space, tree_bytes


def test_the_bytes_of_all_files_below_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(b"x" * 10)
    (tmp_path / "a" / "b" / "two").write_bytes(b"x" * 5)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert tree_bytes(tmp_path) == 15


def test_a_missing_folder_has_no_bytes(tmp_path: Path) -> None:
    assert tree_bytes(tmp_path / "missing") == 0


def test_the_nearest_folder_that_exists_decides_how_much_is_free(tmp_path: Path) -> None:
    assert abs(free_bytes(tmp_path / "not" / "yet") - shutil.disk_usage(tmp_path).free) < 1 << 30


def test_too_little_room_is_no_space_left_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1_500_000))
    with pytest.raises(OSError, match=r"3.2 GB must be free .* found 1.5 MB") as caught:
        require_free_space(tmp_path, 3_200_000_000)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == os.fspath(tmp_path)


def test_just_enough_room_and_nothing_needed_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1_500_000))
    assert require_free_space(tmp_path, 1_500_000) is None
    assert require_free_space(tmp_path / "missing", 0) is None
    with pytest.raises(OSError, match="must be free"):
        require_free_space(tmp_path, 1_500_001)


def test_a_file_system_that_does_not_know_its_room_does_not_stop_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(place: object) -> None:
        asked.append(place)
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert require_free_space(tmp_path, 10**18) is None
    assert asked == [str(tmp_path)]
