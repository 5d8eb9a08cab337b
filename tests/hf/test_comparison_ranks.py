"""Kept and present weights are compared on two ranks together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.hf import rollback_runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compared(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """How every case ended on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    outcomes = run_ranks(rollback_runs.compare_on_ranks, 2, folder=folder, timeout=300)
    return [outcome.check() for outcome in outcomes]


@pytest.mark.parametrize("case", ["noise", "stopped", "looked into", "stock", "arbiter", "labels"])
def test_both_ranks_decide_alike_and_end_with_the_same_weights(
    compared: list[dict[str, Any]], case: str
) -> None:
    assert compared[0][case] == compared[1][case]


def test_damaged_weights_are_rolled_back_on_both(compared: list[dict[str, Any]]) -> None:
    (event,) = compared[0]["noise"]["events"]
    assert event["finding"]["cause"] == "weights"
    assert 28 <= event["step"] <= 30
    assert event["target_step"] < 28


def test_damaged_weights_stop_both(compared: list[dict[str, Any]]) -> None:
    assert 28 <= compared[0]["stopped"]["step"] <= 31
    assert compared[0]["stopped"]["cause"] == "weights"


def test_a_healthy_run_that_is_looked_into_is_the_unguarded_one_to_the_bit(
    compared: list[dict[str, Any]],
) -> None:
    assert compared[0]["looked into"]["passes"] > 0
    assert [event["event"] for event in compared[0]["looked into"]["events"]] == ["dismissed"]
    assert compared[0]["looked into"]["weights"] == compared[0]["stock"]["weights"]


def test_the_evaluation_set_decides_for_both(compared: list[dict[str, Any]]) -> None:
    """Labels at random from step 40 to the end, and the weights from before at the end."""
    (event,) = [each for each in compared[0]["arbiter"]["events"] if each["event"] == "rollback"]
    assert event["step"] in (59, 60)
    assert 30 <= event["target_step"] < 40
    assert "on the evaluation set the weights of step" in event["finding"]["message"]


def test_wrong_labels_that_have_passed_are_undone_on_both(compared: list[dict[str, Any]]) -> None:
    """Each rank reads half of the rows; the inputs of both count."""
    (event,) = [each for each in compared[0]["labels"]["events"] if each["event"] == "rollback"]
    assert 55 <= event["step"] <= 61
    assert 30 <= event["target_step"] < 40
    assert "the labels contradicted what the model had learnt" in event["finding"]["message"]
