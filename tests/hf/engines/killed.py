"""A run under an engine that is killed on one rank, and resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_divguard.storage.failpoints import watch_failpoints
from tests.hf.engines.runs import digest, make_trainer, without_times

MOMENTS = (
    "save begun",
    "host wrote",
    "sealed",
    "rollback decided",
    "weights restored",
    "rollback saved",
    "rollback recorded",
)
"""Failpoints that every rank comes to."""

KILLED_AT = "killed_at.txt"


def kill(folder: str) -> None:
    """Note the time and end this process by SIGKILL."""
    Path(folder, KILLED_AT).write_text(str(time.time()), encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def killed(folder: str, moment: str | float | None, count: int) -> Iterator[None]:
    """Kill this process at the ``count``-th time of a failpoint, or after so many seconds."""
    if isinstance(moment, float):
        timer = threading.Timer(moment, kill, [folder])
        timer.daemon = True
        timer.start()
        yield
        timer.cancel()
        return
    seen = 0

    def listen(name: str) -> None:
        nonlocal seen
        seen += name == moment
        if name == moment and seen == count:
            kill(folder)

    with watch_failpoints(listen):
        yield


def train_or_resume(
    rank: int,
    folder: str,
    engine: str,
    moment: str | float | None = None,
    bad_rank: int = 0,
    count: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Train through a NaN that is rolled back, or go on from what is in ``folder``; ``bad_rank`` is killed.

    Args:
        rank: This rank.
        folder: The run folder.
        engine: What the run trains under.
        moment: A failpoint, or seconds; ``None`` to kill nothing.
        bad_rank: The rank that is killed.
        count: At which time of the failpoint.
        **options: More arguments of the run.
    """
    trainer = make_trainer(engine, folder, fault=range(11, 13), **{"max_steps": 20, **options})
    with killed(folder, moment if rank == bad_rank else None, count):
        trainer.train(resume_from_checkpoint="auto")
    return {"digest": digest(trainer), "events": without_times(trainer.divguard_events)}
