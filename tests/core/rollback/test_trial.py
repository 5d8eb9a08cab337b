"""Small damage that no single loss shows: found in the mean of many, tried on many batches."""

from __future__ import annotations

import random

import pytest

from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.loss_range import LossRange, Usual
from hf_divguard.core.rollback.trial import judge_small

USUAL = Usual(level=1.5, spread=0.1, first=3.0)


def noisy(level: float, count: int, seed: int = 0) -> list[float]:
    lot = random.Random(seed)
    return [level + lot.gauss(0.0, 0.1) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_a_rise_of_the_noise_of_one_loss_shows_in_the_mean_of_many(seed: int) -> None:
    range_ = LossRange()
    for loss in noisy(1.5, 40, seed):
        range_.observe(loss, None)
    assert range_.take_slow_rise() == []
    for loss in noisy(1.65, 16, seed + 50):
        range_.observe(loss, None)
        risen = range_.take_slow_rise()
        if risen:
            break
    assert len(risen) in (8, 16)
    assert range_.usual.level < 1.6  # what has risen does not belong to the usual range


@pytest.mark.parametrize("seed", range(20))
def test_a_steady_loss_calls_for_few_such_looks(seed: int) -> None:
    range_, found = LossRange(), 0
    for loss in noisy(1.5, 300, seed):
        range_.observe(loss, None)
        found += bool(range_.take_slow_rise())
    assert found <= 3


@pytest.mark.parametrize(
    ("pairs", "looks", "found"),
    [
        pytest.param({40: [(1.7, 1.5)] * 8, 20: [(1.7, 1.52)] * 8}, 8, "damage", id="both states do better"),
        pytest.param({40: [(1.7, 1.5)] * 8}, 8, "damage", id="one state, by much"),
        pytest.param({40: [(1.6, 1.5)] * 8}, 8, "none", id="one state, by little: it may be luck"),
        pytest.param({40: [(1.7, 1.5)] * 8, 20: [(1.7, 1.72)] * 8}, 8, "none", id="one state does worse"),
        pytest.param({40: [(1.7, 1.5)] * 4, 20: [(1.7, 1.52)] * 4}, 4, "unclear", id="too few looks"),
        pytest.param(
            {
                40: [(1.9 - 0.05 * look, 1.5) for look in range(8)],
                20: [(1.9 - 0.05 * look, 1.5) for look in range(8)],
            },
            8,
            "unclear",
            id="it recovers by itself",
        ),
        pytest.param({}, 8, "none", id="nothing is kept from before"),
    ],
)
def test_small_damage_needs_every_kept_state_and_many_batches(
    pairs: dict[int, list[tuple[float, float]]], looks: int, found: str
) -> None:
    assert judge_small(pairs, USUAL, looks=looks) == found


def raised(level: float) -> tuple[Incident, int]:
    """Return an incident after a rise that no single loss shows, and its step."""
    made, step = Incident(watches_small=True), 0
    for step, loss in enumerate([*noisy(1.5, 60, 3), *noisy(level, 20, 4)], start=1):
        made.observe(step, loss, 1.0)
        if made.is_slow:
            break
    return made, step


def test_small_damage_is_undone_after_some_looks_with_a_state_from_before_the_rise() -> None:
    made, step = raised(1.68)
    assert made.is_due(step)
    acts = []
    for later in range(8):
        ruling = made.rule(step + later, [1.68], {50: [1.5], 20: [1.55]}, is_asked=False)
        acts.append(ruling.act)
    assert acts == ["none"] * 7 + ["act"]
    assert (ruling.cause, ruling.good_step) == ("weights", 50)


def test_harder_batches_are_no_small_damage() -> None:
    made, step = raised(1.68)
    for later in range(3):
        ruling = made.rule(step + later, [1.68], {50: [1.67], 20: [1.7]}, is_asked=False)
    assert (ruling.act, made.is_open) == ("dismiss", False)


def test_small_damage_is_watched_only_where_it_can_be_undone() -> None:
    made = Incident()
    for step, loss in enumerate([*noisy(1.5, 60, 3), *noisy(1.68, 20, 4)], start=1):
        made.observe(step, loss, 1.0)
    assert not made.is_slow


def test_at_the_end_of_training_less_has_to_speak_for_a_look() -> None:
    made = Incident(watches_small=True)
    steady = [1.5 + 0.1 * (step % 3 - 1) for step in range(60)]
    for step, loss in enumerate([*steady, *[each + 0.09 for each in steady[:8]]], start=1):
        made.observe(step, loss, 1.0)
    assert not made.is_open
    made.observe_level(68, is_last=True)
    assert made.is_slow
    ruling = made.rule(68, [1.7] * 8, {50: [1.5] * 8, 20: [1.52] * 8}, is_asked=False, looks=8)
    assert ruling.cause == "weights"
