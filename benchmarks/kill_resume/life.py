"""Inside a life: the training announces what it does, and stops for a kill at a file operation."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import Trainer

from benchmarks.kill_resume.disk import update_digest
from benchmarks.kill_resume.series import Aim, Series
from benchmarks.kill_resume.training import make_trainer
from hf_divguard.storage.failpoints import watch_failpoints
from tests.processes import become_rank


class Announcer:
    """Announces what the training does to the killer, and waits for the kill at a file operation.

    Args:
        pipe: Where to announce it.
        aim: Where to wait for the kill.
        is_armed: Whether the aim counts from the start on; otherwise from the first checkpoint on.
    """

    def __init__(self, pipe: int, aim: Aim | None, is_armed: bool) -> None:
        self._pipe = pipe
        self._aim = aim
        self._is_armed = is_armed
        self._phase: str | None = None
        self._operations = 0
        self._passed = 0

    def __call__(self, line: str) -> None:
        if line.startswith("saved"):
            self._is_armed = True
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, f"{line}\n".encode())

    def begin(self, phase: str) -> None:
        """Count the file operations of ``phase`` from now on."""
        self._phase, self._operations = phase, 0
        self(f"{phase} begins")

    def end(self) -> None:
        """Count no more; wait for the kill if all operations of this phase came before the aim."""
        phase = self._phase
        self(f"{phase} done")
        if self._operations:  # a deletion that had nothing to delete does not count
            if self._is_aimed_at:
                self._wait_for_the_kill()
            if self._is_armed and self._aim is not None and self._aim.kind == phase:
                self._passed += 1
        self(f"{phase} ends")
        self._phase = None

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, which is ``phase`` while it runs."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.begin(phase)
            result = function(*args, **kwargs)
            self.end()
            return result

        return wrapped

    def count_operations(self) -> None:
        """Count the file operations of the phases; Python reports each just before it is done."""
        changing = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}

        def hook(event: str, details: tuple[Any, ...]) -> None:
            if self._phase is None:
                return
            if event in changing or (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)):
                if self._is_aimed_at and self._operations == self._aim.operation:  # type: ignore[union-attr]
                    self._wait_for_the_kill()
                self._operations += 1

        sys.addaudithook(hook)

    @property
    def _is_aimed_at(self) -> bool:
        aim = self._aim
        return aim is not None and self._is_armed and aim.kind == self._phase and self._passed == aim.skip

    def _wait_for_the_kill(self) -> None:
        self(f"stopped {self._phase} {self._operations}")
        while True:
            signal.pause()


def follow_phases(announce: Announcer, series: Series) -> contextlib.AbstractContextManager[None]:
    """Announce the phases of a save: ours by its failpoints, the deletion of the stock Trainer by its function."""
    announce.count_operations()
    if not series.is_ours:
        holder: Any = Trainer if hasattr(Trainer, "_rotate_checkpoints") else transformers.trainer
        name = "_rotate_checkpoints" if holder is Trainer else "rotate_checkpoints"
        setattr(holder, name, announce.during("delete", getattr(holder, name)))
        return contextlib.nullcontext()
    begins = {"host wrote": "publish", "deletion renamed": "delete"}
    ends = {"sealed" if series.trainer == "in_place" else "checkpoint published", "checkpoint deleted"}

    def listen(moment: str) -> None:
        if moment in begins:
            announce.begin(begins[moment])
        elif moment in ends:
            announce.end()

    return watch_failpoints(listen)


def hash_weights(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        update_digest(digest, (name, tensor))
    return digest.hexdigest()


def live(
    series: Series,
    run_dir: str,
    *,
    rank: int,
    port: int,
    pipe: int,
    aim: Aim | None,
    resume: bool,
    limit: int | None,
) -> None:
    """Train in this process until killed or done, and announce it to ``pipe``."""
    announce = Announcer(pipe, aim if rank == 0 else None, is_armed=resume)
    try:
        become_rank(rank, series.ranks, port)
        trainer = make_trainer(series, run_dir, announce, limit)
        with follow_phases(announce, series):
            trainer.train(resume_from_checkpoint=True if resume else None)
        announce(f"done {hash_weights(trainer.model)}")
        if series.ranks > 1:
            torch.distributed.barrier()
    except BaseException as error:
        traceback.print_exc()
        announce(f"failed {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        os._exit(1)
