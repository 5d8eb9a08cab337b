"""One training at a time in a run folder: a lock that ends with the process that holds it.

The lock is the system's (``flock``, through the package filelock), so that the end of a process
releases it, SIGKILL included. Beside it stands who holds it. Between hosts it works where the
file system shares such locks: NFS with locking, Lustre with ``-o flock``, GPFS, CephFS. Where it
does not (``nolock``, ``localflock``), the holder's file is touched every few seconds, and whoever
comes from another host looks whether that goes on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import filelock

from hf_divguard.core.state import StateError, decode, encode
from hf_divguard.errors import FolderInUseError
from hf_divguard.storage.events import EVENTS_FOLDER, make_events_folder
from hf_divguard.storage.jsonio import encode_json, read_json

__all__ = ["LOCK_NAME", "OWNER_NAME", "FolderLock", "LockOwner"]

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"
"""The locked file, in the folder of events. It stays when the lock is released."""

OWNER_NAME = "lock.json"
"""Who holds the lock; empty when nobody does."""

_BEAT_SECONDS = 5.0
_WATCH_SECONDS = 12.0
# Whoever has not touched its file for an hour is not waited for. Clocks of hosts may differ by less than that.
_OLD_SECONDS = 3600.0
_READ_SECONDS = 2.0
_MAX_BYTES = 1 << 14
_WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})


@dataclass(frozen=True)
class LockOwner:
    """Who trains in a folder.

    Args:
        host: Name of the computer.
        pid: Process id.
        since: When it took the lock, in seconds since 1970.
        token: Name of this start of the training, the same on all of its ranks.
    """

    host: str
    pid: int
    since: float
    token: str


class FolderLock:
    """The right to write checkpoints into one folder.

    Args:
        run_dir: The folder.
        token: Name of this start of the training. Another rank of the same start may hold the lock.
        host: Name of this computer.
    """

    def __init__(self, run_dir: str | os.PathLike[str], token: str, host: str | None = None) -> None:
        folder = Path(run_dir, EVENTS_FOLDER)
        self._run_dir = Path(run_dir)
        self._lock_path = folder / LOCK_NAME
        self._owner_path = folder / OWNER_NAME
        self._me = LockOwner(host or socket.gethostname(), os.getpid(), time.time(), token)
        # Not for one thread only: the lock belongs to the process.
        self._lock = filelock.FileLock(self._lock_path, thread_local=False)
        self._holds = False
        self._ended = threading.Event()

    def acquire(self, *, create: bool = True) -> bool:
        """Take the lock, or raise if another training has it.

        Args:
            create: Whether to make the lock if there is none. Without it, nothing is written
                into a folder that no training of ours has used.

        Returns:
            Whether this start of the training has the lock now; ``False`` only without ``create``.

        Raises:
            FolderInUseError: If another training has it.
            OSError: If the lock cannot be made.
        """
        if not create and not self._lock_path.exists():
            return False
        make_events_folder(self._run_dir)
        try:
            is_locked = self._try_to_lock()
        except filelock.Timeout:
            owner = self._read_owner(_READ_SECONDS)
            if owner is not None and owner.token == self._me.token:
                return True
            raise FolderInUseError(_in_use(self._run_dir, owner)) from None
        try:
            owner = self._read_owner()
            if owner is not None and owner.token == self._me.token:
                return True
            if owner is not None and (owner.host != self._me.host or not is_locked) and self._is_alive(owner):
                raise FolderInUseError(_in_use(self._run_dir, owner))
            self._holds = True
            try:
                self._write_owner(encode_json(encode(self._me)))
            except OSError as error:
                logger.warning("Who trains in %s could not be noted (%s).", self._run_dir, error)
            threading.Thread(target=self._beat, name="divguard-lock", daemon=True).start()
        finally:
            if not self._holds:
                self._lock.release()
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens without it, and in a fork of the process that has it."""
        if not self._holds or os.getpid() != self._me.pid:
            return
        self._holds = False
        self._ended.set()
        with contextlib.suppress(OSError):
            self._write_owner(b"")
        self._lock.release()

    def _try_to_lock(self) -> bool:
        try:
            self._lock.acquire(timeout=0)
        except OSError as error:
            if isinstance(error, filelock.Timeout) or error.errno not in _WITHOUT_LOCKS:
                raise
            logger.warning(
                "The file system of %s has no locks (%s). A second training in this folder is noticed by the time "
                "stamp of %s only.",
                self._run_dir,
                error,
                self._owner_path,
            )
            return False
        return True

    def _is_alive(self, owner: LockOwner) -> bool:
        """Return whether ``owner`` touches its file; watch it for some seconds if it did so lately."""
        first = self._touched()
        if first is None or abs(time.time() - first) > _OLD_SECONDS:
            return False
        logger.info(
            "A training on host %s was in %s; checking for %.0f s whether it still is.",
            owner.host,
            self._run_dir,
            _WATCH_SECONDS,
        )
        until = time.monotonic() + _WATCH_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, _WATCH_SECONDS / 10))
            if self._touched() not in (first, None):
                return True
        return False

    def _touched(self) -> float | None:
        # Opened, not only looked up: network file systems ask the server then.
        with contextlib.suppress(OSError):
            descriptor = os.open(self._owner_path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                return os.fstat(descriptor).st_mtime
            finally:
                os.close(descriptor)
        return None

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._owner_path)

    def _read_owner(self, patience: float = 0.0) -> LockOwner | None:
        """Return who holds the lock; ``None`` if that cannot be read within ``patience`` seconds."""
        until = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError, ValueError, StateError):
                held = read_json(self._owner_path, max_bytes=_MAX_BYTES)
                owner: LockOwner = decode(LockOwner, held, "The owner of the lock")
                return owner
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)

    def _write_owner(self, text: bytes) -> None:
        # In place: a rank on another computer must not see an older file of the same name.
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(self._owner_path, flags, 0o666)
        with open(descriptor, "wb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "must be a regular file", str(self._owner_path))
            os.ftruncate(descriptor, 0)
            file.write(text)
            file.flush()
            os.fsync(descriptor)


def _in_use(run_dir: Path, owner: LockOwner | None) -> str:
    who = "another process"
    if owner is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
        who = f"process {owner.pid} on host {owner.host}, since {since}"
    return (
        f"A folder takes the checkpoints of one training at a time, but {run_dir} is in use by {who}. Wait until that "
        "training has ended, end it, or set another `output_dir`. Nothing was changed."
    )
