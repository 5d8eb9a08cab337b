from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hf_divguard.storage.archives import read_host_json
from hf_divguard.storage.checksums import file_digest
from hf_divguard.storage.regular_files import flush_tree, list_files, open_regular_file


def test_files_are_listed_by_posix_path_with_sizes_and_the_rest_in_words(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"123")
    (tmp_path / "a" / "_divguard_tmp-1").write_bytes(b"1")
    (tmp_path / "to_folder").symlink_to("a")
    (tmp_path / "to_file").symlink_to("a/b/file")
    (tmp_path / "to_nothing").symlink_to("b")
    os.mkfifo(tmp_path / "pipe")
    assert list_files(tmp_path, limit=10) == (
        {"a/b/file": 3, "to_file": 3},
        {
            "pipe": "a FIFO",
            "to_folder": "a symbolic link to a folder",
            "to_nothing": "a symbolic link that leads nowhere",
        },
    )


def test_a_folder_of_too_many_entries_is_refused(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / str(number)).touch()
    with pytest.raises(ValueError, match="at most 4 entries"):
        list_files(tmp_path, limit=4)


def test_a_socket_and_a_folder_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(ValueError, match="a socket or device"):
            open_regular_file("socket")
    with pytest.raises(ValueError, match="a folder"):
        open_regular_file(tmp_path)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        file_digest(tmp_path / "file")
        flush_tree(tmp_path)
        with pytest.raises(ValueError, match="a folder"):
            open_regular_file(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_short_file_is_judged_by_its_ends_where_nothing_more_may_be_parsed(tmp_path: Path) -> None:
    """After many large files of a checkpoint the small ones must not seem damaged."""
    path = tmp_path / "config.json"
    path.write_text('{"global_step": 7, "rest": 1}')
    assert read_host_json(path, max_bytes=0) == {"global_step": 7}
    path.write_text('{"global_step": 7, ')
    with pytest.raises(ValueError, match="brace"):
        read_host_json(path, max_bytes=0)
