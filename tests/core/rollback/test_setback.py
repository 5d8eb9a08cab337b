"""A loss of progress so large that a rollback is better than waiting."""

from __future__ import annotations

import json
import math
import random

import pytest

from hf_divguard.core.rollback.setback import SetbackCheck


def first_setback(losses: list[float], check: SetbackCheck | None = None) -> tuple[int, int] | None:
    """Return the step at which a setback is found and its onset, if there is one."""
    check = check or SetbackCheck()
    for step, loss in enumerate(losses, start=1):
        finding = check.observe(step, loss)
        if finding is not None:
            return finding.step, finding.onset_step
    return None


def learnt(seed: int = 0, steps: int = 200, noise: float = 0.1) -> list[float]:
    """Return a healthy curve that falls from 6 to about 2."""
    random.seed(seed)
    return [2.0 + 4.0 * 0.97**step + random.gauss(0.0, noise) for step in range(steps)]


def test_a_large_loss_of_progress_is_found_within_20_steps_although_it_recovers() -> None:
    """The loss comes back by itself, but the state from before it is better now."""
    recovering = [5.5 - 0.05 * step for step in range(60)]
    assert first_setback(learnt() + recovering) == (218, 201)


@pytest.mark.parametrize(
    "after",
    [[9.0] * 15 + [2.0] * 40, [3.0] * 60, [9.0, 2.0] * 30, [math.nan] * 40],
    ids=["recovers within 15 steps", "a quarter lost", "every other value", "nan"],
)
def test_what_is_short_shallow_or_not_a_number_is_no_setback(after: list[float]) -> None:
    """Those are left to the detectors."""
    assert first_setback(learnt() + after) is None


@pytest.mark.parametrize(("noise", "steps"), [(0.1, 400), (1.0, 400), (3.0, 400)])
def test_healthy_runs_have_none(noise: float, steps: int) -> None:
    """Over 200 seeds and noise up to three quarters of all that is learnt."""
    assert [seed for seed in range(200) if first_setback(learnt(seed, steps, noise))] == []


def test_a_constant_series_has_nothing_to_lose() -> None:
    """Without progress there is no setback."""
    assert first_setback([2.0] * 100 + [2.1] * 50) is None


def test_a_metric_below_zero_is_judged_alike() -> None:
    """A negative loss, as of a likelihood."""
    curve = [loss - 100.0 for loss in [*learnt(), *[5.5] * 30]]
    assert first_setback(curve) == (218, 201)


def test_the_memory_survives_json_in_mid_setback() -> None:
    """A resumed run finds it at the same step."""
    check, curve = SetbackCheck(), [*learnt(), *[5.5] * 10]
    assert first_setback(curve, check) is None
    other = SetbackCheck()
    other.load_state_dict(json.loads(json.dumps(check.state_dict())))
    findings = [other.observe(step, 5.5) for step in range(211, 221)]
    assert [finding is not None for finding in findings] == [False] * 7 + [True] * 3


def test_after_a_rollback_the_diverged_stretch_is_forgotten() -> None:
    """It takes 20 new values to find another one."""
    check = SetbackCheck()
    first_setback([*learnt(), *[5.5] * 19], check)
    check.rewind(180)
    assert check.observe(220, 5.5) is None


def test_a_memory_that_cannot_be_read_is_refused() -> None:
    """With a sentence."""
    with pytest.raises(ValueError, match="The state of SetbackCheck must hold"):
        SetbackCheck().load_state_dict({"first": "none"})
