"""When a run is rolled back, how far, how often, and when it stops instead."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.policy import Decision, RollbackPolicy, Target

EVERY_20 = [Target(step, step) for step in range(20, 401, 20)]


def finding(onset: int, kind: str = "jump") -> Finding:
    """Return an error that began at ``onset``."""
    return Finding(
        step=onset + 9,
        onset_step=onset,
        kind=kind,
        severity="error",
        metric="loss",
        value=9.0,
        limit=2.4,
        message="`loss` = 9.",
    )


def fail(
    policy: RollbackPolicy, onset: int, step: int, targets: Any = EVERY_20, kind: str = "jump"
) -> Decision:
    """Let a run fail, and carry out what the policy says."""
    there = [target for target in targets if target.step <= step]
    decision = policy.decide(finding(onset, kind), step, there)
    if decision.target is not None:
        policy.record(decision, step)
    return decision


@pytest.mark.parametrize(
    ("onset", "margin", "target"),
    [(203, 0, 200), (202, 0, 200), (201, 0, 180), (211, 0, 200), (211, 10, 180), (202, 1, 180)],
)
def test_the_first_rollback_goes_to_the_newest_state_that_the_fault_cannot_have_touched(
    onset: int, margin: int, target: int
) -> None:
    """The loss of the onset comes from the weights before it; the update before them may be the bad one."""
    decision = fail(RollbackPolicy(margin_steps=margin), onset, onset + 9)
    assert decision.target is not None
    assert decision.target.step == target
    assert (decision.attempt, decision.incident, decision.lr_factor) == (1, 1, 1.0)


def test_failing_again_at_the_same_place_goes_further_back_each_time_and_then_gives_up() -> None:
    """An older state, then one more with half the rate, then the end; each time with twice the patience."""
    policy = RollbackPolicy(max_rollbacks=3, cooldown_steps=20)
    decisions = [fail(policy, 201, 210), fail(policy, 212, 240), fail(policy, 242, 290)]
    assert [decision.target and decision.target.step for decision in decisions] == [180, 160, 140]
    assert [decision.cooldown_steps for decision in decisions] == [20, 40, 80]
    assert [decision.lr_factor for decision in decisions] == [1.0, 1.0, 0.5]
    end = fail(policy, 292, 380)
    assert end.target is None
    assert "failed again after 3 rollback(s) (`divguard_max_rollbacks`)" in end.reason
    assert end.onset_step == 201, "the model ends with a state from before the first onset"
    assert policy.rollbacks == 3


def test_a_checkpoint_saved_after_a_rollback_counts_as_the_state_it_holds() -> None:
    """Its number is high, its weights are old: failing again does not go to the same weights once more."""
    policy = RollbackPolicy()
    fail(policy, 201, 210)
    decision = fail(policy, 240, 250, [Target(160, 160), Target(180, 180), Target(210, 180)])
    assert decision.target == Target(160, 160)


def test_a_fault_that_was_only_trained_through_goes_back_to_the_same_state() -> None:
    """Once the fault has passed, the state from before it is as good as it was, and the rate stays."""
    policy = RollbackPolicy(max_rollbacks=2)
    fail(policy, 201, 210)
    decision = fail(policy, 212, 240, kind="rollback_repeated")
    assert decision.target is not None
    assert (decision.target.step, decision.lr_factor) == (180, 1.0)
    assert not policy.may_try_again()


def test_a_run_that_fails_elsewhere_goes_to_its_newest_good_state_but_the_attempts_still_count() -> None:
    """After a healthy stretch the states made since are good: nothing older is taken."""
    policy = RollbackPolicy(max_rollbacks=2)
    fail(policy, 201, 210)
    second = fail(policy, 331, 340)
    assert second.target is not None
    assert (second.target.step, second.attempt, second.onset_step) == (320, 2, 331)
    assert fail(policy, 390, 399).target is None


def test_an_incident_is_over_after_ten_cooldowns_without_an_error() -> None:
    """Then the next fault has all attempts again."""
    policy = RollbackPolicy(max_rollbacks=1, cooldown_steps=20)
    fail(policy, 51, 60)
    assert policy.is_open(280)
    assert not policy.is_open(281)
    decision = fail(policy, 290, 299)
    assert (decision.incident, decision.attempt) == (2, 1)
    assert decision.target == Target(280, 280)


def test_findings_are_muted_in_the_cooldown_alone() -> None:
    """The step of the rollback and the cool-down after it."""
    policy = RollbackPolicy(cooldown_steps=20)
    fail(policy, 201, 210)
    assert [policy.is_muted(step) for step in (210, 230, 231)] == [True, True, False]


@pytest.mark.parametrize("targets", [[], [Target(200, 200)]], ids=["none at all", "only later ones"])
def test_without_a_state_that_is_old_enough_the_run_is_given_up_with_what_would_help(
    targets: list[Target],
) -> None:
    """Never silence, and never a state that the fault has touched."""
    decision = fail(RollbackPolicy(), 201, 210, targets)
    assert decision.target is None
    assert (
        "no checkpoint is old enough: the onset is step 201, so one of step 199 or earlier" in decision.reason
    )
    assert "`divguard_snapshot_steps`" in decision.reason


def test_where_nothing_older_is_left_the_oldest_is_tried_at_a_lower_rate() -> None:
    """With one checkpoint the second attempt differs by its rate."""
    policy = RollbackPolicy(max_rollbacks=3)
    fail(policy, 201, 210, [Target(180, 180)])
    decision = fail(policy, 212, 240, [Target(180, 180)])
    assert decision.target == Target(180, 180)
    assert decision.lr_factor == 0.5


def test_a_single_allowed_rollback_keeps_the_rate() -> None:
    """The lower rate is for a last attempt after others."""
    assert fail(RollbackPolicy(max_rollbacks=1), 201, 210).lr_factor == 1.0


def test_cuts_of_the_rate_add_up_from_the_step_of_a_state_on() -> None:
    """A state saved before two cuts lacks both, one saved between them lacks the second."""
    policy = RollbackPolicy(lr_factor=0.5, max_rollbacks=5)
    fail(policy, 201, 210)
    fail(policy, 212, 240)
    assert [policy.rate_factor_since(step) for step in (180, 210, 239, 240)] == [0.25, 0.5, 0.5, 1.0]


def test_the_memory_survives_json_and_decides_as_before() -> None:
    """A killed and resumed run takes the same decision as one that was not killed."""
    policy = RollbackPolicy(lr_factor=0.9)
    fail(policy, 201, 210)
    fail(policy, 212, 240)
    other = RollbackPolicy(lr_factor=0.9)
    other.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert other == policy
    assert fail(other, 245, 290) == fail(policy, 245, 290)


@pytest.mark.parametrize(
    "broken",
    [{}, {"attempt": "two"}, {"attempt": None}, {"origins_tried": 3}, {"rate_cuts": [[1]]}],
    ids=str,
)
def test_a_memory_that_cannot_be_read_is_refused_and_changes_nothing(broken: dict[str, Any]) -> None:
    """Missing or foreign values; the policy stays as it was."""
    policy = RollbackPolicy()
    fail(policy, 201, 210)
    before = policy.state_dict()
    memory = {**before, **broken} if broken else {}
    with pytest.raises(ValueError, match="state of RollbackPolicy"):
        policy.load_state_dict(memory)
    assert policy.state_dict() == before
