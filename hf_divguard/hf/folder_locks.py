"""The folders that one ``train()`` call may write to, agreed on by all ranks."""

from __future__ import annotations

import contextlib
import os
import uuid

from hf_divguard.errors import FolderInUseError
from hf_divguard.hf.ranks import Ranks
from hf_divguard.storage.lock import FolderLock

__all__ = ["FolderLocks"]


class FolderLocks(contextlib.ExitStack):
    """Locks that are held until this context ends.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, FolderLocks() as locks:
        ...     locks.hold(folder, Ranks(0, 1))
        ...     sorted(os.listdir(os.path.join(folder, "divguard")))
        ['lock', 'lock.json']
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: set[str] = set()

    def hold(self, run_dir: str, ranks: Ranks, *, create: bool = True) -> None:
        """Lock ``run_dir`` for this training, once on each file system. Called by all ranks.

        Args:
            run_dir: The folder.
            ranks: The processes of the run.
            create: Whether to make the lock if there is none.

        Raises:
            FolderInUseError: On every rank, if another training uses the folder.
            CheckpointSaveError: On every rank, if the lock cannot be made.
        """
        key = os.path.realpath(run_dir)
        if key in self._held:
            return
        lock = FolderLock(run_dir, ranks.broadcast(uuid.uuid4().hex))
        self.callback(lock.release)
        # Rank 0 first: the others, where they see the same folder, find that it has the lock for all.
        held = False
        for is_my_turn in (ranks.rank == 0, ranks.rank != 0):
            in_use: FolderInUseError | None = None
            failed: OSError | None = None
            if is_my_turn:
                try:
                    held = lock.acquire(create=create)
                except FolderInUseError as error:
                    in_use = error
                except OSError as error:
                    failed = error
            for theirs in ranks.gather(in_use):
                if theirs is not None:
                    lock.release()
                    raise in_use or theirs
            ranks.raise_if_any_failed(failed, f"Preparing {run_dir} for checkpoints")
        if any(ranks.gather(held)):
            self._held.add(key)
