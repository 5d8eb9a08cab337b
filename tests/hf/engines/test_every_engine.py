"""Every engine: each rank holds a part of weights or optimizer, and all of them go back together."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Trainer

from tests.hf.engines import runs
from tests.hf.engines.launch import NEEDS_TRANSFORMERS_5

pytestmark = NEEDS_TRANSFORMERS_5

NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: `make test-engines` does it",
)
NEEDS_SHARDED_MODELS = pytest.mark.skipif(
    not hasattr(Trainer, "_defer_fsdp_gradient_reduction"),
    reason="this version of Transformers cannot train a model that it has sharded",
)
ENGINES = [
    "fsdp2",
    pytest.param("distributed-config", marks=NEEDS_SHARDED_MODELS),
    *(pytest.param(f"zero{stage}", marks=[NEEDS_DEEPSPEED, pytest.mark.slow]) for stage in (1, 2, 3)),
    pytest.param("fsdp2-full", marks=pytest.mark.slow),
    pytest.param("fsdp1", marks=pytest.mark.slow),
]
WHAT: dict[str, runs.Options] = {
    "from_disk_and_memory": {},
    "healthy": {},
    "compare": {},
    "give_up": {},
    "skip": {},
    "unreadable": {},
    "write_after_evaluation": {},
    "resume": {},
}

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The engine under test."""
    return str(request.param)


@pytest.fixture(scope="module")
def both(engine: str, run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank saw in each of the runs."""
    folder = tmp_path_factory.mktemp("fsdp")
    outcomes = run_ranks(runs.several, 2, folder=folder, engine=engine, what=WHAT, timeout=400)
    return [outcome.check() for outcome in outcomes]


@pytest.mark.parametrize("source", ["disk", "memory"])
def test_weights_and_optimizer_come_back_to_the_bit_on_every_rank(both: Ranks, source: str) -> None:
    """One decision and one target; the part that each rank holds is that of the target."""
    first, second = (rank["from_disk_and_memory"][source] for rank in both)
    assert first["events"] == second["events"]
    targets = [(event["step"], event["target_step"], event["target"]) for event in first["events"]]
    assert targets[0] == (11, 8, "memory" if source == "memory" else "checkpoint-8")
    for rank in (first, second):
        assert rank["same"] == [True] * len(targets)
        assert rank["moved"]
        assert rank["finite"]
        assert rank["step"] == 16


def test_a_healthy_run_is_the_unguarded_one_to_the_bit(both: Ranks) -> None:
    """With every guard on, and weights compared twice."""
    for rank in both:
        assert rank["healthy"]["same"]
        assert {event["event"] for event in rank["healthy"]["events"]} <= {"dismissed"}
        assert rank["healthy"]["passes"] >= 4
        assert rank["healthy"]["best"]


def test_damaged_weights_are_found_by_the_comparison_and_undone(both: Ranks) -> None:
    """All ranks run the same forward passes and come to the same result."""
    first, second = (rank["compare"] for rank in both)
    assert first["events"] == second["events"]
    assert first["causes"] == ["weights"]
    assert first["same"] == second["same"] == [True]
    assert first["losses"][-1] < first["losses"][20]


def test_a_run_that_is_given_up_holds_the_best_weights_on_every_rank(both: Ranks) -> None:
    """Those of the checkpoint that the error names."""
    first, second = (rank["give_up"] for rank in both)
    assert first["error"] == second["error"]
    assert f"The model holds the weights of /checkpoint-{first['checkpoint']}" in first["error"]
    assert first["same"]
    assert second["same"]


def test_an_update_that_is_not_finite_is_left_out_on_every_rank(both: Ranks) -> None:
    """The norm of all ranks' gradients decides."""
    for rank in both:
        skipped = [event["step"] for event in rank["skip"]["events"] if event["event"] == "update_skipped"]
        assert skipped == [11, 12]
        assert rank["skip"]["finite"]


def test_one_rank_that_cannot_read_its_part_has_all_ranks_take_an_older_state(
    both: Ranks, engine: str
) -> None:
    """The file has its size, but other bytes. With full state dicts there are no parts."""
    if engine == "fsdp2-full":
        pytest.skip("rank 0 alone reads a full state dict")
    first, second = (rank["unreadable"] for rank in both)
    assert first == second
    assert first["targets"][0] == 4
    assert all(first["same"])


def test_what_is_written_after_a_forward_pass_counts_in_the_next_one(both: Ranks) -> None:
    """An evaluation leaves parameters gathered; a rollback at the same step must not be lost on them."""
    for rank in both:
        for source in ("memory", "disk"):
            now, wanted = rank["write_after_evaluation"][source]
            assert now == wanted


def test_a_resumed_run_is_the_one_that_was_not_interrupted(both: Ranks, engine: str) -> None:
    """Weights and optimizer of every rank."""
    if engine == "fsdp1":
        pytest.skip("accelerate 1.15 resumes FSDP1 with empty moments: the stock Trainer differs, too")
    assert all(rank["resume"]["same"] for rank in both)
