"""One training at a time in a folder: real processes that hold the lock, end, fork and are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_divguard.core.state import encode
from hf_divguard.errors import FolderInUseError
from hf_divguard.storage import lock as lock_module
from hf_divguard.storage.jsonio import encode_json
from hf_divguard.storage.lock import LOCK_NAME, OWNER_NAME, FolderLock, LockOwner
from tests.processes import fork, wait_for


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def hold_until_killed(run: Path, and_then: Callable[[], object] = lambda: None) -> int:
    """Start a process that holds the lock of ``run``; return its id when it has it."""
    ready = run.with_name(f"{run.name}-ready")

    def work() -> None:
        FolderLock(run, "first").acquire()
        and_then()
        ready.touch()
        time.sleep(60)

    pid = fork(work)
    wait_until(ready.exists)
    ready.unlink()
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for(pid)


def test_a_second_process_is_refused_and_the_sentence_names_the_first(tmp_path: Path) -> None:
    pid = hold_until_killed(tmp_path / "run")
    try:
        with pytest.raises(FolderInUseError) as caught:
            FolderLock(tmp_path / "run", "second").acquire()
    finally:
        kill(pid)
    message = str(caught.value)
    assert (
        f"{tmp_path / 'run'} is in use by process {pid} on host {socket.gethostname()}, since 20" in message
    )
    assert "set another `output_dir`" in message


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    kill(hold_until_killed(tmp_path / "run"))
    began = time.monotonic()
    mine = FolderLock(tmp_path / "run", "second")
    assert mine.acquire()
    assert time.monotonic() - began < 1.0
    mine.release()


def test_a_forked_worker_that_outlives_its_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    workers = tmp_path / "workers"

    def fork_a_worker() -> None:
        worker = fork(lambda: time.sleep(60))
        workers.write_text(str(worker))

    kill(hold_until_killed(tmp_path / "run", fork_a_worker))
    mine = FolderLock(tmp_path / "run", "second")
    assert mine.acquire()
    mine.release()
    os.kill(int(workers.read_text()), signal.SIGKILL)


def test_a_forked_worker_cannot_release_the_lock_of_its_process(tmp_path: Path) -> None:
    mine = FolderLock(tmp_path / "run", "first")
    mine.acquire()
    assert wait_for(fork(mine.release)) == 0
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path / "run", "second").acquire()
    mine.release()


def test_after_its_release_the_lock_is_free_also_in_the_same_process(tmp_path: Path) -> None:
    for token in ("first", "second"):
        mine = FolderLock(tmp_path / "run", token)
        assert mine.acquire()
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()} "):
            FolderLock(tmp_path / "run", "third").acquire()
        mine.release()


def test_the_ranks_of_one_start_share_the_lock(tmp_path: Path) -> None:
    pid = hold_until_killed(tmp_path / "run")
    assert FolderLock(tmp_path / "run", "first").acquire()
    kill(pid)


def test_nothing_is_written_where_no_lock_is_to_be_made(tmp_path: Path) -> None:
    assert not FolderLock(tmp_path / "run", "first").acquire(create=False)
    assert os.listdir(tmp_path) == []


def test_a_lock_that_is_there_counts_where_none_is_to_be_made(tmp_path: Path) -> None:
    pid = hold_until_killed(tmp_path / "run")
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path / "run", "second").acquire(create=False)
    kill(pid)


# ---- other hosts, whose locks this one may not see


def left_by_another_host(run: Path) -> Path:
    run.joinpath("divguard").mkdir(parents=True)
    owner = LockOwner(host="node-7", pid=4711, since=time.time(), token="first")
    path = run / "divguard" / OWNER_NAME
    path.write_bytes(encode_json(encode(owner)))
    return path


def test_a_training_on_another_host_that_lives_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_WATCH_SECONDS", 3.0)
    path, ended = left_by_another_host(tmp_path / "run"), threading.Event()

    def beat() -> None:
        while not ended.wait(0.3):
            os.utime(path)

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(FolderInUseError, match="process 4711 on host node-7"):
            FolderLock(tmp_path / "run", "second").acquire()
    finally:
        ended.set()
        other.join()


def test_a_training_on_another_host_that_is_dead_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_module, "_WATCH_SECONDS", 0.5)
    left_by_another_host(tmp_path / "run")
    mine = FolderLock(tmp_path / "run", "second")
    assert mine.acquire()
    mine.release()


def test_who_holds_the_lock_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_BEAT_SECONDS", 0.05)
    mine = FolderLock(tmp_path / "run", "first")
    mine.acquire()
    path = tmp_path / "run" / "divguard" / OWNER_NAME
    os.utime(path, (1.0, 1.0))
    wait_until(lambda: path.stat().st_mtime > 1.0)
    mine.release()


@pytest.mark.parametrize("name", [LOCK_NAME, OWNER_NAME])
def test_a_named_pipe_in_the_place_of_a_file_does_not_hang(name: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "divguard").mkdir(parents=True)
    os.mkfifo(tmp_path / "run" / "divguard" / name)
    began = time.monotonic()
    mine = FolderLock(tmp_path / "run", "first")
    with contextlib.suppress(OSError):
        mine.acquire()
    mine.release()
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("found", ["a file", "a link that leads nowhere"])
def test_what_has_the_name_of_our_folder_is_named_and_left_alone(tmp_path: Path, found: str) -> None:
    folder = tmp_path / "divguard"
    if found == "a file":
        folder.write_text("mine")
    else:
        folder.symlink_to("nowhere")
    with pytest.raises(NotADirectoryError, match=rf"found {found}\. Move it away.*divguard"):
        FolderLock(tmp_path, "first").acquire()
    assert os.path.lexists(folder)
    assert not folder.is_dir()
