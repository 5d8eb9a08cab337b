"""A fault on one rank of two: both ranks see it at the same step, and leave together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.hf.watched_ranks import FAULT_STEP
from tests.processes import run_python


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """How every run ended on each rank of one torchrun."""
    folder = tmp_path_factory.mktemp("two_ranks")
    done = run_python("-m", "tests.hf.watched_ranks", folder, ranks=2, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


pytestmark = pytest.mark.slow  # one start of torchrun, some twelve seconds

RUNS = [("loss", "stop"), ("loss", "abort"), ("gradient", "stop"), ("gradient", "abort")]


@pytest.mark.parametrize(("makes_nan", "action"), RUNS)
def test_nan_on_one_rank_ends_both_at_the_check_that_follows(
    makes_nan: str, action: str, on_two_ranks: list[dict[str, Any]]
) -> None:
    for rank in on_two_ranks:
        run = rank[f"{makes_nan} {action}"]
        assert run["found_step"] == FAULT_STEP
        assert run["step"] == 15  # looked at before the save that is due there
        assert run["found_metric"] == {"loss": "loss", "gradient": "grad_norm"}[makes_nan]
        assert run["checkpoints"] == ([5, 10, 15] if action == "stop" else [5, 10])


@pytest.mark.parametrize(("makes_nan", "action"), RUNS)
def test_both_ranks_leave_within_ten_seconds_of_the_fault(
    makes_nan: str, action: str, on_two_ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank[f"{makes_nan} {action}"] for rank in on_two_ranks)
    assert first["fault_at"] is None
    assert 0 < first["left_at"] - second["fault_at"] < 10
    assert 0 < second["left_at"] - second["fault_at"] < 10


@pytest.mark.parametrize("average_tokens", [True, False], ids=["mean over all tokens", "mean of means"])
def test_the_loss_of_a_step_is_that_of_all_ranks(
    average_tokens: bool, on_two_ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank[f"by hand {average_tokens}"] for rank in on_two_ranks)
    assert first["seen"] == second["seen"]
    assert len(first["seen"]) == 8
    assert first["seen"] == pytest.approx(first["by_hand"], rel=1e-5)
