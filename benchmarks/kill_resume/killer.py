"""The killer: it starts a life, follows its announcements, and ends it where an aim says."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.kill_resume.life import live
from benchmarks.kill_resume.series import LIMIT, Aim, Series
from tests.processes import fork, free_port, wait_for

PATIENCE_SECONDS = 120.0
"""A life that announces nothing for so long counts as failed."""


class Life:
    """The processes of one life of a training.

    Args:
        series: What is trained.
        run_dir: Folder of the run.
        root: Folder of the logs.
        aim: Where to kill it; ``None`` to let it live.
        resume: Whether it resumes.
        limit: Its ``save_total_limit``.
    """

    def __init__(
        self,
        series: Series,
        run_dir: Path,
        root: Path,
        *,
        aim: Aim | None,
        resume: bool,
        limit: int | None = LIMIT,
    ) -> None:
        reading, writing = os.pipe()
        port = free_port() if series.ranks > 1 else 0
        self.pids: list[int] = []
        for rank in range(series.ranks):

            def work(rank: int = rank) -> None:
                os.close(reading)
                pipe = writing if rank == 0 else os.open(os.devnull, os.O_WRONLY)
                if rank:
                    os.close(writing)
                live(
                    series,
                    str(run_dir),
                    rank=rank,
                    port=port,
                    pipe=pipe,
                    aim=aim,
                    resume=resume,
                    limit=limit,
                )

            self.pids.append(fork(work, root / f"rank{rank}.log"))
        os.close(writing)
        self._reading = reading
        self._rest = b""
        self.alive = set(self.pids)

    def lines(self, deadline: float | None = None) -> Iterator[tuple[float, str]]:
        """Yield what rank 0 announces, with the moment, until it ends or ``deadline`` passes."""
        while True:
            now = time.monotonic()
            limit = now + PATIENCE_SECONDS if deadline is None else deadline
            if not select.select([self._reading], [], [], max(0.0, limit - now))[0]:
                if deadline is None:
                    yield time.monotonic(), "failed Silence: nothing was heard for too long"
                return
            data = os.read(self._reading, 65536)
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                yield time.monotonic(), line.decode()

    def kill(self, generator: random.Random) -> None:
        """Send SIGKILL to the ranks: to all at once, or to one first and to the others within a second."""
        order = list(self.pids)
        generator.shuffle(order)
        pause = generator.choice([0.0, generator.uniform(0.0, 1.0)]) if len(order) > 1 else 0.0
        for number, pid in enumerate(order):
            if number and pause:
                time.sleep(pause)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        for pid in self.pids:
            wait_for(pid)

    def end(self) -> None:
        """End what is left of a life that failed by itself."""
        time.sleep(0.2)
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        os.close(self._reading)


@dataclasses.dataclass
class Seen:
    """What the announcements of one life said."""

    started: int | None = None
    saving: int | None = None
    phase: str | None = None
    done: str | None = None
    failed: str | None = None
    killed: bool = False
    published: set[int] = dataclasses.field(default_factory=set)

    def note(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "started":
            self.started = int(rest)
        elif word == "save":
            self.saving = int(rest)
        elif word == "saved":
            self.published.add(int(rest))
            self.saving = None
        elif word in ("publish", "delete"):
            if word == "publish" and rest == "done" and self.saving is not None:
                self.published.add(self.saving)
            self.phase = None if rest == "ends" else word
        elif word == "done":
            self.done = rest
        elif word == "failed":
            self.failed = rest


def follow(life: Life, aim: Aim | None, armed: bool, generator: random.Random) -> Seen:
    """Listen to a life, end it where ``aim`` says, and return what was seen of it."""
    seen = Seen()
    passed = 0
    deadline: float | None = None
    while not seen.killed:
        for moment, line in life.lines(deadline):
            seen.note(line)
            if aim is None:
                continue
            word = line.split()[0]
            if word == "saved" and not armed:
                armed = True
                if aim.kind == "anywhere":
                    deadline = moment + aim.delay
                    break
            if armed and aim.kind == "anywhere" and word == "started":
                deadline = moment + aim.delay
                break
            if armed and aim.kind == "write" and word == "save" and deadline is None:
                passed += 1
                if passed > aim.skip:
                    deadline = moment + aim.delay
                    break
            if word == "stopped":
                deadline = moment
                break
        else:
            if deadline is None or time.monotonic() < deadline:
                break  # the pipe is closed: the life has ended by itself
        if deadline is not None and time.monotonic() >= deadline:
            seen.killed = True
    if seen.killed and seen.failed is None:
        life.kill(generator)
        for _, line in life.lines(time.monotonic()):
            if not line.startswith("failed"):  # a rank that outlives another for a moment ends in an error
                seen.note(line)
        seen.killed = seen.done is None
    else:
        seen.killed = False
        life.end() if seen.failed else life.wait()
    life.close()
    return seen
