"""Wherever one rank fails in or around a save, all end within 30 s, with the same error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.storage.checkpoints import find_checkpoints
from tests.hf import failing_ranks
from tests.tiny import names_in

RunRanks = Callable[..., Any]


def same_error_of(outcomes: list[Any]) -> str:
    """Return the error that all ranks have ended with, in time."""
    errors = {outcome.error for outcome in outcomes}
    assert len(errors) == 1, "\n".join(f"{outcome.error}\n{outcome.log}" for outcome in outcomes)
    assert all(outcome.seconds < 30 for outcome in outcomes)
    return str(errors.pop())


def complete_steps(folder: Path) -> list[int]:
    return [info.step for info in find_checkpoints(folder) if info.verdict.status == "complete"]


@pytest.mark.parametrize("event", ["on_evaluate", "on_save", "on_log"])
@pytest.mark.parametrize("on_rank", [0, 1])
def test_an_error_in_a_callback_around_a_save_ends_all_ranks_with_the_same_error(
    on_rank: int, event: str, run_ranks: RunRanks, tmp_path: Path
) -> None:
    outcomes = run_ranks(
        failing_ranks.in_callback, 2, output_dir=tmp_path / "out", event=event, on_rank=on_rank, timeout=60
    )
    error = same_error_of(outcomes)
    assert error == (
        f"CheckpointSaveError: The evaluation or save of step 4 failed on rank {on_rank}: ValueError: a callback has "
        "failed."
    )
    assert complete_steps(tmp_path / "out") == ([2, 4] if event == "on_save" else [2])


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate"])
def test_a_save_that_one_rank_asks_for_takes_place_on_all(
    event: str, run_ranks: RunRanks, tmp_path: Path
) -> None:
    evaluates = {"eval_strategy": "steps", "eval_steps": 1} if event == "on_evaluate" else {}
    outcomes = run_ranks(
        failing_ranks.asking,
        2,
        output_dir=tmp_path / "out",
        event=event,
        switch="should_save",
        max_steps=4,
        timeout=60,
        **evaluates,
    )
    assert [outcome.check()["step"] for outcome in outcomes] == [4, 4]
    assert complete_steps(tmp_path / "out") == [2, 3, 4]


def test_an_end_that_one_rank_asks_for_takes_place_on_all(run_ranks: RunRanks, tmp_path: Path) -> None:
    outcomes = run_ranks(
        failing_ranks.asking,
        2,
        output_dir=tmp_path / "out",
        event="on_step_end",
        switch="should_training_stop",
        timeout=60,
    )
    assert [outcome.check()["step"] for outcome in outcomes] == [3, 3]


@pytest.mark.parametrize("switch", ["should_save", "should_evaluate"])
def test_what_one_rank_asks_for_at_a_log_ends_all_with_the_same_error(
    switch: str, run_ranks: RunRanks, tmp_path: Path
) -> None:
    outcomes = run_ranks(
        failing_ranks.asking,
        2,
        output_dir=tmp_path / "out",
        event="on_log",
        switch=switch,
        eval_on_save=False,
        divguard_save_mode="staged",
        timeout=60,
    )
    assert "step 3 must be asked for on all ranks alike, but only rank 0 of 2 does so" in same_error_of(
        outcomes
    )
    assert complete_steps(tmp_path / "out") == [2]


@pytest.mark.parametrize("on_rank", [0, 1])
def test_an_error_in_the_hosts_save_ends_all_ranks_with_the_same_error(
    on_rank: int, run_ranks: RunRanks, tmp_path: Path
) -> None:
    outcomes = run_ranks(failing_ranks.in_save, 2, output_dir=tmp_path / "out", on_rank=on_rank, timeout=60)
    error = same_error_of(outcomes)
    assert f"checkpoint-4 failed on rank {on_rank}: ValueError: a callback has failed" in error
    assert complete_steps(tmp_path / "out") == [2]
    assert names_in(tmp_path / "out") == ["checkpoint-2"]
    assert max(outcome.seconds for outcome in outcomes) < 15


@pytest.mark.slow
@pytest.mark.parametrize("on_rank", [0, 1])
def test_an_error_before_an_exchange_of_the_host_ends_those_that_wait_there(
    on_rank: int, run_ranks: RunRanks, tmp_path: Path
) -> None:
    outcomes = run_ranks(
        failing_ranks.in_save, 2, output_dir=tmp_path / "out", on_rank=on_rank, meets=True, timeout=60
    )
    assert f"checkpoint-4 failed on rank {on_rank}: ValueError" in same_error_of(outcomes)
    assert complete_steps(tmp_path / "out") == [2]


@pytest.mark.slow
@pytest.mark.parametrize("meets", [True, False])
def test_four_ranks_end_with_the_error_of_one(meets: bool, run_ranks: RunRanks, tmp_path: Path) -> None:
    outcomes = run_ranks(failing_ranks.in_save, 4, output_dir=tmp_path / "out", meets=meets, timeout=60)
    assert "checkpoint-4 failed on rank 1: ValueError" in same_error_of(outcomes)


@pytest.mark.parametrize("meets", [True, False])
def test_a_rank_that_dies_in_a_save_ends_the_others(meets: bool, run_ranks: RunRanks, tmp_path: Path) -> None:
    first, second, third = run_ranks(
        failing_ranks.in_save, 3, output_dir=tmp_path / "out", how="dies", meets=meets, timeout=60
    )
    assert second.error == "it ended with -9"
    assert str(same_error_of([first, third])).startswith("CheckpointSaveError: ")
    assert complete_steps(tmp_path / "out") == [2]


def test_a_rank_that_dies_does_not_count_as_a_save_that_training_goes_on_without(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    first, _ = run_ranks(
        failing_ranks.in_save,
        2,
        output_dir=tmp_path / "out",
        how="dies",
        divguard_on_save_error="continue",
        timeout=60,
    )
    assert str(first.error).startswith("CheckpointSaveError: ")
    assert first.seconds < 30


def test_with_continue_an_error_on_one_rank_is_waited_for_and_passed_over(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    outcomes = run_ranks(
        failing_ranks.in_save, 2, output_dir=tmp_path / "out", divguard_on_save_error="continue", timeout=60
    )
    for outcome in outcomes:
        assert outcome.check()["step"] == 8
    assert complete_steps(tmp_path / "out") == [2, 6, 8]


def test_an_error_that_all_ranks_have_is_raised_as_it_is(run_ranks: RunRanks, tmp_path: Path) -> None:
    outcomes = run_ranks(failing_ranks.without_its_metric, 2, output_dir=tmp_path / "out", timeout=60)
    assert same_error_of(outcomes).startswith("MetricNotFoundError: ")


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(run_ranks: RunRanks, tmp_path: Path) -> None:
    outcomes = run_ranks(failing_ranks.slow_rank, 2, output_dir=tmp_path / "out", seconds=35.0, timeout=120)
    for outcome in outcomes:
        assert outcome.check()["step"] == 4
    assert complete_steps(tmp_path / "out") == [2, 4]


def test_ranks_that_are_started_again_do_not_hear_the_error_of_the_first_start(run_ranks: RunRanks) -> None:
    """``torchrun`` keeps its store over a restart."""
    for outcome in run_ranks(failing_ranks.start_again, 2, timeout=60):
        assert outcome.check() == [0, 1]
