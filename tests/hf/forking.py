"""A server that forks the processes of a scenario, and says how each of them ended."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.hf import scenarios


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def become_rank(rank: int, request: dict[str, Any], port: int) -> None:
    ranks = request["ranks"]
    if ranks == 1:
        return
    # On one machine two nodes of one process each differ from one node of two by the local rank alone.
    local_rank, local_size = (0, 1) if request["nodes"] else (rank, ranks)
    os.environ.update(
        OMP_NUM_THREADS="1",  # accelerate would give each node all cores, and the threads would wait for each other
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(local_size),
        GROUP_RANK=str(rank if request["nodes"] else 0),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def live(rank: int, request: dict[str, Any], port: int, pipe: int, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    became = time.monotonic()
    outcome: dict[str, Any] = {"value": None, "error": None}
    try:
        become_rank(rank, request, port)
        outcome["value"] = getattr(scenarios, request["scenario"])(rank, **request["options"])
    except BaseException as error:
        traceback.print_exc()
        outcome["error"] = f"{type(error).__name__}: {error}"
    outcome["seconds"] = time.monotonic() - became
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(pipe, "w") as file:
        json.dump(outcome, file)
    # Others may still want to talk to this rank.
    time.sleep(0.2 if request["ranks"] > 1 else 0.0)
    os._exit(0)


def answer(request: dict[str, Any], root: Path) -> list[dict[str, Any]]:
    port = free_port()
    logs = [root / f"rank{rank}.log" for rank in range(request["ranks"])]
    pids, pipes = [], []
    for rank in range(request["ranks"]):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            live(rank, request, port, writing, logs[rank])
        os.close(writing)
        pids.append(pid)
        pipes.append(reading)
    deadline = time.monotonic() + request["timeout"]
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
    outcomes = []
    for pid, pipe, log in zip(pids, pipes, logs, strict=True):
        if pipe in waiting:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(pipe)
        how = "it did not end in time" if pipe in waiting else f"it ended with {status}"
        outcome = json.loads(texts[pipe] or b"{}") or {
            "value": None,
            "error": how,
            "seconds": request["timeout"] if pipe in waiting else 0.0,
        }
        outcomes.append({**outcome, "log": log.read_text(errors="replace")[-6000:]})
    return outcomes


def main() -> None:
    root = Path(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line), root)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
