"""When the losses ask for a rollback by themselves."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.policy import Decision, RollbackPolicy, Target
from hf_divguard.core.rollback.triggers import RollbackTriggers


class Run:
    """A run of 200 healthy losses, and what comes after them."""

    def __init__(self, *, watches_setbacks: bool = True, max_rollbacks: int = 3) -> None:
        random.seed(0)
        self.policy = RollbackPolicy(max_rollbacks=max_rollbacks, cooldown_steps=30)
        self.watch = RollbackTriggers(self.policy, watches_setbacks=watches_setbacks)
        self.step = 0
        self.feed([2.0 + 4.0 * 0.97**step + random.gauss(0.0, 0.05) for step in range(200)])

    def feed(self, losses: list[float], *, ends: bool = False) -> list[tuple[int, str]]:
        """Take losses step by step; return what was asked for, and when."""
        asked = []
        for number, loss in enumerate(losses, start=1):
            self.step += 1
            self.watch.observe(self.step, loss)
            finding = self.watch.judge(self.step, is_last=ends and number == len(losses))
            if finding is not None:
                asked.append((self.step, finding.kind))
        return asked

    def rewind(self, kind: str = "jump", target: int = 180) -> None:
        """Roll back now."""
        numbers: Any = {
            "step": self.step,
            "onset_step": 201,
            "value": 9.0,
            "limit": 2.0,
            "message": "`loss` = 9.",
        }
        decision = Decision(Target(target, target), self.policy.attempt + 1, 1, 201, cooldown_steps=30)
        self.policy.record(decision, self.step)
        self.watch.rewind(target, self.step, Finding(kind=kind, severity="error", metric="loss", **numbers))


def test_a_setback_is_asked_to_be_undone_where_rolling_back_is_what_is_done() -> None:
    """And only there."""
    recovering = [5.5 - 0.05 * step for step in range(30)]
    assert Run().feed(recovering)[0] == (218, "setback")
    assert Run(watches_setbacks=False).feed(recovering) == []


@pytest.mark.parametrize(
    ("after", "asked"),
    [
        ([2.0] * 40, []),
        ([9.0] * 40, [(241, "not_recovered")]),
        ([9.0] * 15 + [2.0] * 25, [(241, "rollback_repeated")]),
    ],
    ids=["recovered", "still there", "passed"],
)
def test_the_end_of_a_cooldown_is_judged_once(after: list[float], asked: list[tuple[int, str]]) -> None:
    """The cool-down of 30 steps after step 210 ends at 240."""
    run = Run()
    run.feed([9.0] * 10)
    run.rewind()
    assert run.feed(after) == asked


def test_a_step_that_was_undone_says_nothing_about_the_time_after() -> None:
    """Losses are delivered every few steps: those of steps before a rollback may come after it."""
    policy = RollbackPolicy(cooldown_steps=20)
    watch = RollbackTriggers(policy, watches_gradients=True)
    for step in range(1, 101):
        watch.observe(step, 2.0, 1.0)
    decision = Decision(Target(90, 90), 1, 1, 99, cooldown_steps=20)
    policy.record(decision, 103)
    numbers: Any = {"step": 103, "onset_step": 101, "value": 9.0, "limit": 2.0, "message": "`loss` = 9."}
    watch.rewind(90, 103, Finding(kind="damage", severity="error", metric="loss", **numbers))
    for step in range(101, 130):
        watch.observe(step, 9.0 if step <= 103 else 2.0, 1e4 if step <= 103 else 1.0)
        assert watch.judge(step, is_last=False) is None


def test_where_training_ends_in_a_cooldown_it_is_judged_there() -> None:
    """The last step is the last chance."""
    run = Run()
    run.feed([9.0] * 10)
    run.rewind()
    assert run.feed([9.0] * 12, ends=True) == [(222, "not_recovered")]


def test_a_run_that_recovered_by_itself_is_not_stopped_for_it() -> None:
    """With no attempt left the recovered state is kept."""
    run = Run(max_rollbacks=1)
    run.feed([9.0] * 10)
    run.rewind()
    assert run.feed([9.0] * 15 + [2.0] * 25) == []


def test_a_setback_that_no_detector_calls_a_divergence_is_undone_once_and_then_left_to_recover() -> None:
    """Data that became harder must not end a run that learns them."""
    run = Run()
    run.feed([5.0] * 20)
    run.rewind("setback")
    assert run.feed([5.0] * 100) == []


def test_a_setback_whose_fault_breaks_the_restored_state_again_is_not_left_to_recover() -> None:
    """The first loss after the rollback is as good as ever: it is not the data that became harder."""
    run = Run()
    run.feed([5.0] * 20)
    run.rewind("setback")
    assert run.feed([2.0] + [5.0] * 40) == [(251, "not_recovered")]


@pytest.mark.parametrize("loss", [9.0, 2.0], ids=["bad", "good"])
def test_whether_the_fault_is_still_there_is_known_during_the_cooldown(loss: float) -> None:
    """It decides whether anything is saved."""
    run = Run()
    run.feed([9.0] * 10)
    run.rewind()
    run.feed([loss] * 12)
    assert run.watch.sees_the_fault() is (loss == 9.0)


@pytest.mark.parametrize("watches", [True, False])
def test_unclipped_gradients_a_hundred_times_the_baseline_are_asked_to_be_undone_once(watches: bool) -> None:
    """A hundred steps of them are one explosion."""
    watch = RollbackTriggers(RollbackPolicy(), watches_setbacks=True, watches_gradients=watches)
    asked = []
    for step in range(1, 301):
        watch.observe(step, 2.0, 1.0 if step <= 100 else 500.0)
        finding = watch.judge(step, is_last=False)
        asked += [] if finding is None else [(step, finding.onset_step, finding.kind, finding.severity)]
    assert asked == ([(103, 101, "grad_explosion", "error")] if watches else [])


def test_the_memory_survives_json_in_the_middle_of_a_cooldown() -> None:
    """A resumed run asks for the same at the same step."""
    run = Run()
    run.feed([9.0] * 10)
    run.rewind()
    run.feed([9.0] * 10)
    other = RollbackTriggers(run.policy, watches_setbacks=True)
    other.load_state_dict(json.loads(json.dumps(run.watch.state_dict())))
    run.watch = other
    assert run.feed([9.0] * 30) == [(241, "not_recovered")]


@pytest.mark.parametrize(
    "broken",
    [{}, {"recovery": {}, "setback": {}, "gradients": {}, "exploded": [], "may_recover": False}],
    ids=["empty", "hollow"],
)
def test_a_memory_that_cannot_be_read_is_refused(broken: dict[str, Any]) -> None:
    """With a sentence."""
    with pytest.raises(ValueError, match=r"The state of .* must hold"):
        Run().watch.load_state_dict(broken)
