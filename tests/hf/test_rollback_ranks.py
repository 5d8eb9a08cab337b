"""Rollbacks in processes of their own: on two ranks together, and killed in the middle of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import find_checkpoints
from tests.hf import rollback_runs
from tests.hf.rollback_runs import MOMENTS

pytestmark = pytest.mark.slow

# ---- two ranks


@pytest.fixture(scope="module")
def two_ranks(
    run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """How every case ended on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    outcomes = run_ranks(rollback_runs.roll_back_on_ranks, 2, folder=folder, timeout=300)
    return [outcome.check() for outcome in outcomes]


CASES = ["disk", "memory", "accumulation", "one bad rank", "unreadable memory", "rate", "resumed"]


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_have_the_same_events_and_end_with_the_same_weights(
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


def test_a_resume_of_two_ranks_ends_as_the_run_without_an_interruption(
    two_ranks: list[dict[str, Any]],
) -> None:
    """Same events, same weights."""
    assert two_ranks[0]["resumed"] == two_ranks[0]["disk"]


# ---- killed


@pytest.fixture(scope="module")
def never_killed(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How the run ends if nothing kills it."""
    (outcome,) = run_ranks(rollback_runs.train_or_resume, folder=tmp_path_factory.mktemp("never_killed"))
    return dict(outcome.check())


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_during_a_rollback_and_resumed_it_is_the_run_that_was_never_killed(
    moment: str, run_ranks: Callable[..., Any], tmp_path: Path, never_killed: dict[str, Any]
) -> None:
    """Same events, same counter, same weights; and the newest complete checkpoint can be resumed."""
    (killed,) = run_ranks(rollback_runs.train_or_resume, folder=tmp_path, moment=moment)
    assert killed.error == "it ended with -9", killed.log
    complete = [info for info in find_checkpoints(tmp_path) if info.verdict.status == "complete"]
    assert complete[-1].verdict.resumable
    (resumed,) = run_ranks(rollback_runs.train_or_resume, folder=tmp_path)
    assert resumed.check() == never_killed
    lines = (tmp_path / "divguard" / "events.jsonl").read_text().splitlines()
    in_file = [(event["event"], event["number"], event["step"]) for event in map(json.loads, lines)]
    assert in_file == [(event["event"], event["number"], event["step"]) for event in never_killed["events"]]
