"""Rollbacks in processes of their own: on two ranks together, and killed in the middle of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import find_checkpoints
from tests.hf.rolled_back import MOMENTS

pytestmark = pytest.mark.slow  # every process imports torch anew

ROOT = Path(__file__).parents[2]


def run_module(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``tests.hf.rolled_back`` in a process of its own, or in the processes of a launcher."""
    return subprocess.run(
        [sys.executable, *launcher, "-m", "tests.hf.rolled_back", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---- two ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank says of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    # A free port, and an address that needs no look-up of the machine's name.
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d")
    launcher += ("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")
    done = run_module(str(folder), launcher=launcher)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


CASES = ["disk", "memory", "accumulation", "one bad rank", "rate", "resumed"]


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_tell_the_same_events_and_end_with_the_same_weights(
    two_ranks: list[dict[str, Any]], case: str
) -> None:
    """One decision, one target, one state."""
    first, second = (rank[case] for rank in two_ranks)
    assert first == second
    assert [event["event"] for event in first["events"]] == ["rollback"] * len(first["events"])
    assert first["events"]


@pytest.mark.parametrize("case", ["disk", "memory", "accumulation", "one bad rank"])
def test_the_target_is_the_newest_state_from_before_the_fault(
    two_ranks: list[dict[str, Any]], case: str
) -> None:
    """A fault on one rank alone takes both back."""
    event = two_ranks[0][case]["events"][0]
    assert (event["step"], event["target_step"], event["onset_step"]) == (20, 16, 19)
    assert event["target"] == ("memory" if case == "memory" else "checkpoint-16")


def test_a_rolled_back_run_of_two_ranks_learns_on(two_ranks: list[dict[str, Any]]) -> None:
    """Its loss at the end is lower than before the fault."""
    assert two_ranks[0]["rate"]["loss_at_the_end"] < two_ranks[0]["rate"]["loss_before"]


def test_a_resume_of_two_ranks_ends_as_the_run_that_went_through(two_ranks: list[dict[str, Any]]) -> None:
    """Same events, same weights."""
    assert two_ranks[0]["resumed"] == two_ranks[0]["disk"]


# ---- killed


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of the run if nobody kills it."""
    folder = tmp_path_factory.mktemp("never_killed")
    done = run_module(str(folder))
    assert done.returncode == 0, done.stderr[-6000:]
    return dict(json.loads((folder / "told.json").read_text()))


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_during_a_rollback_and_resumed_it_is_the_run_that_was_never_killed(
    moment: str, tmp_path: Path, never_killed: dict[str, Any]
) -> None:
    """Same events, same counter, same weights; and what was left behind is a complete checkpoint."""
    killed = run_module(str(tmp_path), moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-6000:]
    left = [info for info in find_checkpoints(tmp_path / "out") if info.verdict.status == "complete"]
    assert left[-1].verdict.resumable
    resumed = run_module(str(tmp_path))
    assert resumed.returncode == 0, resumed.stderr[-6000:]
    assert json.loads((tmp_path / "told.json").read_text()) == never_killed
    lines = (tmp_path / "out" / "divguard" / "events.jsonl").read_text().splitlines()
    in_file = [(event["event"], event["number"], event["step"]) for event in map(json.loads, lines)]
    assert in_file == [(event["event"], event["number"], event["step"]) for event in never_killed["events"]]
