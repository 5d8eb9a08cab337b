"""Runs code in other processes: fresh ones, the ranks of a distributed run, ones that are killed.

Tests and benchmarks use nothing else for it. There are three ways:

- :func:`run_python`: a fresh interpreter, or as many as there are ranks under ``torchrun``. It takes
  some seconds, as every process imports PyTorch.
- the fixture ``run_ranks`` of ``tests/hf/conftest.py``: a function on every rank of a run, in forks
  of a server that has imported everything. A start takes milliseconds.
- :func:`fork`: any function in a fork of the present process.

In each of them :func:`kill_at` kills the process at a named moment (a failpoint).
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from hf_divguard.storage.failpoints import watch_failpoints

ROOT = Path(__file__).parents[1]

# A free port, and an address for which no name has to be resolved.
TORCHRUN = "-m torch.distributed.run --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1"


# ---- fresh processes


def python(*arguments: Any, ranks: int = 1) -> list[str]:
    """Return the command that runs Python with ``arguments``, under ``torchrun`` if there are several ranks."""
    launcher = [*TORCHRUN.split(), f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process that can import the package and its tests from anywhere."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",  # accelerate would give each rank all cores, and the threads would wait for each other
        **variables,
    }


def run_python(
    *arguments: Any, ranks: int = 1, cwd: Path = ROOT, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run Python in fresh processes until they end; the caller checks ``returncode``.

    Args:
        *arguments: Arguments of Python, for example ``"-m", "tests.hf.on_two_ranks", folder``.
        ranks: Number of processes; several are started by ``torchrun``.
        cwd: Working directory.
        timeout: Seconds after which they are ended.
    """
    return subprocess.run(
        python(*arguments, ranks=ranks),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# ---- forks


def fork(work: Callable[[], object], log: Path | None = None) -> int:
    """Run ``work`` in a fork of this process and return its process id.

    The exit code is 0, or 1 if ``work`` raised.

    Args:
        work: What to run.
        log: File that gets the output. Without it, the output goes where that of this process does.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if log is not None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            # pytest has streams of its own.
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(pid: int) -> int:
    """Wait until a process ends. Return its exit code, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def read_until(pipes: list[int], deadline: float) -> dict[int, bytes | None]:
    """Read pipes to their ends; ``None`` for one that is still open at ``deadline`` (of ``time.monotonic``)."""
    texts = dict.fromkeys(pipes, b"")
    waiting = set(pipes)
    while waiting:
        ready = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            break
        for pipe in ready:
            data = os.read(pipe, 65536)
            texts[pipe] += data
            if not data:
                waiting.discard(pipe)
    return {pipe: None if pipe in waiting else text for pipe, text in texts.items()}


# ---- ranks


def free_port() -> int:
    """Return a port below those that the system gives out by itself, so that none takes it in between."""
    # Seeds of the tests must not make two processes choose the same one.
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def become_rank(rank: int, ranks: int, port: int, *, nodes: bool = False) -> None:
    """Make this process rank ``rank`` of a run, as ``torchrun`` does; alone it stays what it is.

    Args:
        rank: Which one.
        ranks: How many there are.
        port: Port at which rank 0 waits for the others.
        nodes: Whether each rank is a node of its own. On one machine two nodes of one process
            each differ from one node of two processes by the local rank alone.
    """
    if ranks == 1:
        return
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK="0" if nodes else str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE="1" if nodes else str(ranks),
        GROUP_RANK=str(rank if nodes else 0),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    let_ranks_resume_on_cpu()


def let_ranks_resume_on_cpu() -> None:
    """Let Transformers before 5.20 resume on several CPU processes: it asks for "cpu:0", which PyTorch refuses."""
    import torch

    load = torch.load

    def load_to_cpu(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("map_location")).startswith("cpu"):
            kwargs["map_location"] = "cpu"
        return load(*args, **kwargs)

    torch.load = load_to_cpu


# ---- kills


def kill_self() -> NoReturn:
    """End this process by SIGKILL, now."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived SIGKILL")


@contextlib.contextmanager
def kill_at(moment: str | None, *, after: str | None = None, count: int = 1) -> Iterator[None]:
    """Kill this process by SIGKILL when it comes to a failpoint, inside a ``with`` block.

    Args:
        moment: Name of the failpoint; ``None`` to kill nothing.
        after: Failpoint from which on ``moment`` counts; ``None`` for the start.
        count: At which time it comes to ``moment``.
    """
    is_armed, seen = after is None, 0

    def listen(name: str) -> None:
        nonlocal is_armed, seen
        # In this order, so that `after` may be `moment` itself: the next one then.
        if is_armed and name == moment:
            seen += 1
            if seen == count:
                kill_self()
        is_armed |= name == after

    with watch_failpoints(listen):
        yield
