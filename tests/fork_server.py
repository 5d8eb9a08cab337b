"""A process that has imported PyTorch and Transformers, and forks the ranks of a run in milliseconds."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import processes


@dataclass(frozen=True)
class Outcome:
    """How a function ended on one rank."""

    value: Any
    error: str | None
    seconds: float
    log: str

    def check(self) -> Any:
        """Return the value; fail with the log if there was an error."""
        assert self.error is None, f"{self.error}\n{self.log}"
        return self.value


class ForkServer:
    """Starts the server and sends it requests.

    Args:
        folder: Where the ranks write their logs.
    """

    def __init__(self, folder: Path) -> None:
        self._server = subprocess.Popen(
            processes.python("-W", "ignore", "-m", "tests.fork_server", folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=processes.ROOT,
            env=processes.environment(),
        )

    def run(
        self,
        function: Callable[..., Any],
        ranks: int = 1,
        *,
        nodes: bool = False,
        timeout: float = 120.0,
        **options: Any,
    ) -> list[Outcome]:
        """Run a function on every rank of a run, and return how it ended on each.

        Args:
            function: A function of a module, called with the rank and ``options``. What it returns has to be JSON.
            ranks: Number of processes.
            nodes: Whether each rank is a node of its own.
            timeout: Seconds after which ranks that still run are killed.
            **options: What is JSON, or paths.
        """
        request = {
            "function": [function.__module__, function.__qualname__],
            "ranks": ranks,
            "nodes": nodes,
            "timeout": timeout,
            "options": {key: str(v) if isinstance(v, Path) else v for key, v in options.items()},
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return [Outcome(**outcome) for outcome in json.loads(self._server.stdout.readline())]

    def close(self) -> None:
        """End the server."""
        self._server.communicate(timeout=60)


# ---- inside the server


def main(folder: Path) -> None:
    """Answer requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line), folder)) + "\n")
        replies.flush()


def import_everything() -> None:
    """Import what takes long, and show what the package logs."""
    import torch
    import transformers

    import tests.tiny
    from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments

    assert tests.tiny
    assert DivGuardTrainer
    assert DivGuardTrainingArguments
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
    logging.getLogger("hf_divguard").setLevel(logging.INFO)
    gc.collect()
    gc.freeze()  # what was imported is not looked through, and not copied, in each rank


def answer(request: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Run a request on all of its ranks and return the outcomes."""
    port = processes.free_port()
    logs = [folder / f"rank{rank}.log" for rank in range(request["ranks"])]
    pids, pipes = [], []
    for rank, log in enumerate(logs):
        log.unlink(missing_ok=True)
        reading, writing = os.pipe()
        pids.append(processes.fork(lambda r=rank, w=writing: live(r, request, port, w), log))
        os.close(writing)
        pipes.append(reading)
    texts = processes.read_until(pipes, time.monotonic() + request["timeout"])
    outcomes = []
    for pid, pipe, log in zip(pids, pipes, logs, strict=True):
        text = texts[pipe]
        if text is None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = processes.wait_for(pid)
        os.close(pipe)
        how = "it did not end in time" if text is None else f"it ended with {code}"
        outcome = json.loads(text or "null") or {"value": None, "error": how, "seconds": 0.0}
        outcomes.append({**outcome, "log": log.read_text(errors="replace")[-6000:]})
    return outcomes


def live(rank: int, request: dict[str, Any], port: int, pipe: int) -> None:
    """Be one rank: run the function and write its outcome to ``pipe``."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    began = time.monotonic()
    outcome: dict[str, Any] = {"value": None, "error": None}
    try:
        processes.become_rank(rank, request["ranks"], port, nodes=request["nodes"])
        module, name = request["function"]
        outcome["value"] = getattr(importlib.import_module(module), name)(rank, **request["options"])
    except BaseException as error:
        traceback.print_exc()
        outcome["error"] = f"{type(error).__name__}: {error}"
    outcome["seconds"] = time.monotonic() - began
    with os.fdopen(pipe, "w") as file:
        json.dump(outcome, file)
    # Other ranks may still want to talk to this one.
    time.sleep(0.2 if request["ranks"] > 1 else 0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
