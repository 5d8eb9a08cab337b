"""Whether a run has recovered after a rollback."""

from __future__ import annotations

import json
import math
import random

import pytest

from hf_divguard.core.rollback.recovery import RecoveryCheck


def check_after_rollback(after: list[float], before: int = 100) -> RecoveryCheck:
    """Return a check that has seen a noisy level of 2, a rollback from step 120 to 100, and ``after``."""
    random.seed(0)
    check = RecoveryCheck()
    for step in range(1, before + 1):
        check.observe(step, random.gauss(2.0, 0.1))
    for step in range(101, 121):
        check.observe(step, 50.0)
    check.rewind(target_step=100, step=120)
    for step, loss in enumerate(after, start=121):
        check.observe(step, loss)
    return check


@pytest.mark.parametrize(
    ("after", "recovered", "ever_bad"),
    [
        ([2.0] * 20, True, False),
        ([9.0] * 20, False, True),
        ([9.0] * 10 + [2.0] * 10, True, True),
        ([2.0] * 10 + [9.0] * 10, False, True),
        ([2.0] * 19 + [9.0], True, False),
        ([2.0, 9.0] * 10, False, True),
        ([2.0] * 19 + [math.nan], False, False),
        ([], True, False),
        ([9.0], False, False),
        ([9.0, 2.0, 9.0], True, False),
    ],
    ids=[
        "good",
        "bad",
        "passed",
        "came back",
        "one spike",
        "every other",
        "nan at the end",
        "nothing yet",
        "one bad",
        "few with a good one",
    ],
)
def test_the_last_losses_decide_and_a_bad_stretch_is_remembered(
    after: list[float], recovered: bool, ever_bad: bool
) -> None:
    """Nine values have to be good at the end; nine bad ones at any time are reported."""
    check = check_after_rollback(after)
    assert check.has_recovered() is recovered
    assert check.was_ever_bad() is ever_bad


def test_what_came_after_the_target_is_no_measure() -> None:
    """The diverged stretch does not raise the limit."""
    limit = check_after_rollback([]).limit
    assert limit is not None
    assert 2.0 < limit < 2.3


def test_noise_alone_is_not_reported_as_a_fault() -> None:
    """Of 300 healthy cool-downs fewer than one in fifty is judged bad."""
    wrong = 0
    for seed in range(300):
        random.seed(seed)
        check = RecoveryCheck()
        for step in range(1, 101):
            check.observe(step, random.gauss(2.0, 0.1))
        check.rewind(target_step=100, step=100)
        for step in range(101, 121):
            check.observe(step, random.gauss(2.0, 0.1))
        wrong += not check.has_recovered() or check.was_ever_bad()
    assert wrong <= 6


def test_too_few_losses_before_the_target_judge_nothing() -> None:
    """Without a measure every run has recovered."""
    check = check_after_rollback([9.0] * 20, before=5)
    assert check.limit is None
    assert check.has_recovered()


def test_the_first_bad_step_is_named() -> None:
    """It is the onset of what has not recovered."""
    assert check_after_rollback([2.0] * 4 + [9.0] * 16).first_bad_step() == 125


def test_the_memory_survives_json_with_nan_in_it() -> None:
    """A resumed run judges as one that was not cut."""
    check = check_after_rollback([9.0] * 10 + [math.nan])
    other = RecoveryCheck()
    other.load_state_dict(json.loads(json.dumps(check.state_dict(), allow_nan=False)))
    assert other.has_recovered() is check.has_recovered() is False
    assert (other.limit, other.first_bad_step()) == (check.limit, 121)


def test_a_memory_that_cannot_be_read_is_refused() -> None:
    """With a sentence."""
    with pytest.raises(ValueError, match="The state of RecoveryCheck must hold"):
        RecoveryCheck().load_state_dict({"limit": 2.0})
