"""Runs scenarios in processes of their own: as the ranks of a run, under limits, killed by signals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Outcome:
    """How a scenario ended on one rank."""

    value: Any
    error: str | None
    seconds: float
    log: str

    def check(self) -> Any:
        assert self.error is None, f"{self.error}\n{self.log}"
        return self.value


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    # It imports torch once and forks a fresh process for each rank: a start takes milliseconds instead of seconds.
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.hf.forking", str(tmp_path_factory.mktemp("ranks"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=environment,
    )
    yield server
    assert server.stdin is not None
    server.stdin.close()
    server.wait(timeout=60)
    assert server.stdout is not None
    server.stdout.close()


@pytest.fixture
def run_ranks(_server: subprocess.Popen[str]) -> Callable[..., list[Outcome]]:
    """Return ``run(scenario, ranks=1, nodes=False, **options)``: runs a function of ``scenarios`` on each rank."""

    def run(
        scenario: str, ranks: int = 1, *, nodes: bool = False, timeout: float = 120.0, **options: Any
    ) -> list[Outcome]:
        request = {
            "scenario": scenario,
            "ranks": ranks,
            "nodes": nodes,
            "timeout": timeout,
            "options": {key: str(v) if isinstance(v, Path) else v for key, v in options.items()},
        }
        assert _server.stdin is not None
        assert _server.stdout is not None
        _server.stdin.write(json.dumps(request) + "\n")
        _server.stdin.flush()
        return [Outcome(**outcome) for outcome in json.loads(_server.stdout.readline())]

    return run
