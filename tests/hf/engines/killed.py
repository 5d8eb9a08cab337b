"""A run under an engine that is killed on one rank, and resumed."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_divguard.storage.failpoints import watch_failpoints
from tests.hf.engines.trainers import digest, make_trainer, without_times

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
SHOWS_WHERE_AFTER = 50.0
"""Seconds after which a rank that still runs writes into its log where it is."""


class Began(TrainerCallback):
    """Notes that all ranks are set up and training begins."""

    noted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it."""
        Began.noted = True


def kill(folder: str) -> None:
    """Note the time, and whether training has begun, and end this process by SIGKILL."""
    Path(folder, KILLED_AT).write_text(f"{time.time()} {int(Began.noted)}", encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)


def when_killed(folder: Path) -> tuple[float, bool]:
    """Return the time of the kill, and whether training had begun."""
    seconds, began = (folder / KILLED_AT).read_text(encoding="utf-8").split()
    return float(seconds), began == "1"


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
    faulthandler.dump_traceback_later(SHOWS_WHERE_AFTER)
    trainer = make_trainer(
        engine, folder, fault=range(11, 13), callbacks=(Began(),), **{"max_steps": 20, **options}
    )
    with killed(folder, moment if rank == bad_rank else None, count):
        trainer.train(resume_from_checkpoint="auto")
    faulthandler.cancel_dump_traceback_later()
    return {"digest": digest(trainer), "events": without_times(trainer.divguard_events)}
