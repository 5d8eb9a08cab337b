"""Rewards that collapse and KLs that explode; healthy ones of many shapes are left alone."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable

import pytest

from hf_divguard.core.detection.collapse import KlExplosion, RewardCollapse


def healthy(shape: str, seed: int, length: int = 300) -> list[float]:
    """Return rewards of one shape, with the noise of one seed."""
    noise = random.Random(seed)
    drift, rewards = 0.0, []
    for step in range(length):
        drift = 0.9 * drift + 0.03 * noise.gauss(0.0, 1.0)
        gained = 1.0 - math.exp(-step / 80)
        rewards.append(
            {
                "rising": gained + noise.gauss(0.0, 0.08),
                "flat": 0.3 + noise.gauss(0.0, 0.08),
                "drifting": gained + drift,
                "stepwise": (0.2 if step < 100 else 0.8) + noise.gauss(0.0, 0.08),
                "sinking slowly": 0.8 - 0.1 * step / length + noise.gauss(0.0, 0.08),
                "negative": -5.0 + 3.0 * gained + noise.gauss(0.0, 0.08),
                "right or wrong": sum(noise.random() < 0.2 + 0.6 * gained for _ in range(8)) / 8,
                "constant": 1.0,
            }[shape]
        )
    return rewards


SHAPES = (
    "rising",
    "flat",
    "drifting",
    "stepwise",
    "sinking slowly",
    "negative",
    "right or wrong",
    "constant",
)


def steps_of(rule: RewardCollapse | KlExplosion, values: Iterable[float]) -> list[int]:
    return [step for step, value in enumerate(values) if rule.observe(step, value)]


@pytest.mark.parametrize("shape", SHAPES)
def test_healthy_rewards_are_left_alone(shape: str) -> None:
    alarms = [seed for seed in range(12) if steps_of(RewardCollapse(), healthy(shape, seed))]
    assert alarms == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_collapse_is_found_within_ten_logs(shape: str) -> None:
    for seed in range(5):
        rewards = healthy(shape, seed)
        low = min(rewards[:50]) - 0.4
        fallen = [low + (rewards[199] - low) * 0.5**age for age in range(1, 40)]
        found = steps_of(RewardCollapse(), [*rewards[:200], *fallen])
        assert found
        assert 200 <= found[0] <= 210


def test_a_swing_is_reported_once() -> None:
    """What the run came back from is not reported again, unless it falls deeper."""
    swing = [0.5 + 0.2 * math.sin(step / 15) for step in range(600)]
    found = steps_of(RewardCollapse(), swing)
    assert found
    assert found[-1] - found[0] < 100
    assert steps_of(RewardCollapse(), [*swing, *[-0.5] * 20])[-1] == 619


@pytest.mark.parametrize("short", [0, 1, 7, 8, 9])
def test_a_short_history_says_nothing(short: int) -> None:
    assert steps_of(RewardCollapse(), [1.0] * short + [-9.0]) == []
    assert steps_of(KlExplosion(), [0.1] * short + [900.0]) == []


def test_values_that_are_not_finite_are_left_to_others() -> None:
    rule = RewardCollapse()
    assert steps_of(rule, [1.0, math.nan, math.inf, -math.inf] * 20) == []
    assert json.dumps(rule.state_dict(), allow_nan=False)


def test_a_kl_that_grows_is_left_alone_and_one_that_explodes_is_found() -> None:
    growing = [0.0005 * 1.02**step for step in range(400)]
    assert steps_of(KlExplosion(), growing) == []
    assert steps_of(KlExplosion(), [*growing[:200], *[30.0] * 5]) == [202, 203, 204]
    # A single log is no explosion, and far below one nat nothing is.
    assert steps_of(KlExplosion(), [*growing[:200], 30.0, 0.02, 30.0, 0.02]) == []
    assert steps_of(KlExplosion(), [1e-6] * 50 + [0.5] * 50) == []


@pytest.mark.parametrize("rule_class", [RewardCollapse, KlExplosion])
def test_the_memory_goes_on_as_it_was(rule_class: type) -> None:
    values = [*healthy("rising", 3)[:200], *[-5.0] * 10, *[40.0] * 10]
    whole, first, second = rule_class(), rule_class(), rule_class()
    expected = steps_of(whole, values)
    for step, value in enumerate(values[:205]):
        first.observe(step, value)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = [step for step, value in enumerate(values[205:], start=205) if second.observe(step, value)]
    assert rest == [step for step in expected if step >= 205]
    assert second.state_dict() == whole.state_dict()
