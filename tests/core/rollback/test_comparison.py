"""Weights or data: what the losses of kept and present weights on new batches mean."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from hf_divguard.core.rollback.comparison import Budget, Pair, best_step, judge
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.loss_range import LossRange, Usual
from hf_divguard.core.rollback.ruling import Ruling
from hf_divguard.core.rollback.words import why

USUAL = Usual(level=1.6, spread=0.1, first=3.5)


@pytest.mark.parametrize(
    ("pairs", "cause"),
    [
        pytest.param([(6.0, 1.7)], "weights", id="the kept weights do as usual"),
        pytest.param([(6.0, 6.2)], "data", id="both do badly"),
        pytest.param([(6.0, 4.5)], "data", id="untrained weights are less sure of themselves"),
        pytest.param([(1.7, 1.6)], "unknown", id="nothing is wrong"),
        pytest.param([(2.0, 1.9)], "unknown", id="less than the margin"),
        pytest.param([(2.3, 1.6), (1.2, 1.7), (2.4, 1.5)], "unknown", id="a difference within the noise"),
        pytest.param([(2.1, 1.6), (2.2, 1.7), (2.2, 1.6)], "weights", id="a small difference, several times"),
        pytest.param([(float("nan"), 1.7)], "weights", id="the present weights give NaN"),
        pytest.param([(float("nan"), float("nan"))], "data", id="all weights give NaN"),
    ],
)
def test_the_cause_is_told_from_the_pairs(pairs: list[tuple[float, float]], cause: str) -> None:
    assert judge([Pair(*pair) for pair in pairs], USUAL).cause == cause


def test_a_loss_that_is_not_finite_is_put_in_words_too() -> None:
    """Present weights that give NaN, while the data are wrong: that is said in a line, and training goes on."""
    verdict = judge([Pair(float("nan"), 1.7)], USUAL)
    assert why(Ruling("dismiss", "data", 0, verdict)) == (
        "kept weights have a loss of 1.7 on the batches that come now, that of the present ones is not finite "
        "(usual: 1.6)"
    )


def test_states_that_wobble_need_a_larger_difference() -> None:
    pairs = [Pair(2.2, 1.6)] * 4
    assert judge(pairs, USUAL).cause == "weights"
    assert judge(pairs, USUAL, wobble=0.5).cause == "unknown"


def test_the_newest_of_the_states_that_do_as_well_is_taken() -> None:
    assert best_step({10: 2.1, 20: 2.0, 25: 6.0}, spread=0.05) == 20
    assert best_step({10: 2.0, 20: 2.01, 25: float("nan")}, spread=0.05) == 20
    assert best_step({10: float("nan")}, spread=0.05) is None


def healthy(range_: LossRange, steps: int, seed: int = 0) -> list[int]:
    """Feed a falling, noisy loss; return the steps that called for a look."""
    lot = random.Random(seed)
    return [
        step
        for step in range(steps)
        if range_.observe(1.5 + 2.0 * 0.97**step + lot.gauss(0.0, 0.1), 1.0 + 0.1 * lot.random())
    ]


@pytest.mark.parametrize("seed", range(5))
def test_few_steps_of_a_healthy_run_call_for_a_look(seed: int) -> None:
    assert len(healthy(LossRange(), 300, seed)) <= 6


@pytest.mark.parametrize(
    ("loss", "norm"),
    [(3.5, 1.0), (float("nan"), 1.0), (1.5, 30.0)],
    ids=["a jump", "NaN", "a large gradient"],
)
def test_a_step_out_of_the_range_calls_for_a_look(loss: float, norm: float) -> None:
    range_ = LossRange()
    healthy(range_, 200)
    assert range_.observe(loss, norm)


@pytest.mark.parametrize(
    ("losses", "is_objective"),
    [
        pytest.param([3.0, 2.5, 2.0, 1.5, 1.2, 1.0], True, id="falling"),
        pytest.param([0.0, 0.001, 0.004, 0.01, 0.02, 0.1, 0.2], False, id="rises from 0"),
        pytest.param([0.5, 0.2, -0.1, 0.1, 0.2], False, id="below 0"),
    ],
)
def test_a_loss_that_is_no_objective_is_known_as_such(losses: list[float], is_objective: bool) -> None:
    range_ = LossRange()
    for loss in losses:
        range_.observe(loss, None)
    assert range_.is_objective is is_objective


def test_looks_stay_within_their_share_of_the_training_time() -> None:
    budget, taken = Budget(share=0.1, reserve=40.0), 0
    for _ in range(10_000):
        budget.earn(micro_batches=1)
        taken += 2 * budget.take(2)
    assert 0.09 < (taken - 40) / (3 * 10_000) <= 0.1


# ---- an incident


def incident(*, steps_to_learn: int = 8) -> Incident:
    """Return one whose usual loss is about 1.6, after it was higher for some steps."""
    made, lot = Incident(), random.Random(3)
    for step in range(1, 61):
        level = 1.6 if step >= steps_to_learn - 2 else 2.0
        made.observe(step, level + lot.gauss(0.0, 0.05), 1.0)
    made.close()
    return made


def test_damage_is_acted_on_at_the_first_look() -> None:
    made = incident()
    made.observe(61, 6.0, 1.0)
    assert made.is_due(61)
    ruling = made.rule(61, [6.0], {60: [5.5], 55: [1.62]}, is_asked=False)
    assert (ruling.act, ruling.cause, ruling.good_step) == ("act", "weights", 55)


def test_new_data_are_looked_at_less_and_less_often_and_then_are_the_usual_ones() -> None:
    made, looks = incident(), []
    for step in range(61, 200):
        made.observe(step, 6.0, 1.0)
        if made.is_due(step):
            looks.append(step)
            assert made.rule(step, [6.0], {60: [6.1]}, is_asked=False).cause == "data"
    assert looks == [61, 64, 69, 79, 99, 139]
    assert made.range.usual.level == 6.0


def test_what_passing_data_leave_is_undone_and_called_by_its_cause() -> None:
    made = incident()
    made.observe(61, 6.0, 1.0)
    for step in (61, 64, 69):
        assert made.rule(step, [6.0], {60: [6.1]}, is_asked=False).act == "dismiss"
    assert made.rule(79, [3.0], {60: [1.65]}, is_asked=False).act == "none"
    assert made.next_look == 84
    ruling = made.rule(84, [2.7], {60: [1.65]}, is_asked=False)
    assert (ruling.act, ruling.cause) == ("act", "data")


def test_bad_data_are_followed_for_three_batches_after_they_have_passed() -> None:
    """One of them may be easy by chance."""
    made = incident()
    made.observe(61, 6.0, 1.0)
    for step in (61, 64, 69):
        made.rule(step, [6.0], {60: [6.1]}, is_asked=False)
    for step in (79, 80, 81):
        assert made.is_open
        assert made.rule(step, [1.7], {60: [1.65]}, is_asked=False).act != "act"
    assert not made.is_open


def test_what_long_bad_data_leave_is_given_half_of_their_time_to_heal() -> None:
    made = incident()
    made.observe(61, 6.0, 1.0)
    for step in (61, 64, 69, 79):
        made.rule(step, [6.0], {60: [6.1]}, is_asked=False)
    assert made.rule(90, [3.0], {60: [1.65]}, is_asked=False).act == "none"
    assert made.next_look == 99
    assert made.rule(99, [1.7], {60: [1.65]}, is_asked=False).act != "act"


def test_what_heals_by_itself_is_not_undone() -> None:
    made = incident()
    made.observe(61, 2.4, 1.0)
    assert made.rule(61, [2.3], {60: [1.6]}, is_asked=False).act == "none"
    assert made.rule(62, [1.65], {60: [1.6]}, is_asked=False).act != "act"


def test_damage_that_is_no_more_than_a_spike_needs_a_second_look() -> None:
    made = incident()
    made.observe(61, 2.4, 1.0)
    assert made.rule(61, [2.3], {60: [1.6]}, is_asked=False).act == "none"
    ruling = made.rule(62, [2.2], {60: [1.6]}, is_asked=False)
    assert (ruling.act, ruling.cause) == ("act", "weights")


def test_two_faults_close_together_are_two_incidents() -> None:
    made = incident()
    made.observe(61, 6.0, 1.0)
    made.rule(61, [6.0], {60: [1.6]}, is_asked=False)
    made.has_restored(61)
    assert made.rule(62, [1.6], {60: [1.6]}, is_asked=False).act == "dismiss"
    made.observe(63, 6.0, 1.0)
    ruling = made.rule(63, [6.0], {60: [6.1]}, is_asked=False)
    assert (ruling.act, ruling.cause, made.since) == ("dismiss", "data", 63)


def test_damage_soon_after_one_high_batch_is_not_what_that_batch_has_left() -> None:
    """The batch was too high by 0.45 with all weights. Damage of 1.7 is another matter, of 0.7 it may be no other."""
    for present, act in ((3.4, "act"), (2.4, "dismiss")):
        made = incident()
        made.observe(61, 2.05, 1.0)
        made.observe(62, 2.05, 1.0)
        assert made.rule(62, [2.05], {60: [2.05]}, is_asked=False).cause == "data"
        first = made.rule(65, [present], {60: [1.7]}, is_asked=False)
        assert first.act == ("none" if act == "act" else "dismiss")
        if act == "act":
            ruling = made.rule(66, [present], {60: [1.7]}, is_asked=False)
            assert (ruling.act, ruling.cause) == ("act", "weights")


def test_a_high_loss_that_passes_closes_the_incident() -> None:
    made = incident()
    made.observe(61, 2.4, 1.0)
    assert made.rule(61, [1.6], {60: [1.6]}, is_asked=False).act == "dismiss"
    assert not made.is_open


def test_an_incident_survives_a_save() -> None:
    made = incident()
    made.observe(61, 6.0, 1.0)
    made.rule(61, [6.0], {60: [6.1]}, is_asked=False)
    saved: dict[str, Any] = json.loads(json.dumps(made.state_dict(), allow_nan=False))
    other = Incident()
    other.load_state_dict(saved)
    assert other.state_dict() == made.state_dict()
    assert other.rule(64, [3.0], {60: [1.65]}, is_asked=False) == made.rule(
        64, [3.0], {60: [1.65]}, is_asked=False
    )


def test_a_turn_of_domains_that_an_older_state_knows_is_no_damage() -> None:
    """The newest state was sound when it was kept, and does not know these data either."""
    made = incident()
    made.observe(61, 6.0, 1.0)
    ruling = made.rule(61, [6.0], {58: [5.9], 40: [1.6]}, is_asked=False)
    assert (ruling.act, ruling.cause) == ("dismiss", "data")


@pytest.mark.parametrize(("newest", "good"), [(58, 40), (54, 50)])
def test_a_newest_state_that_does_badly_on_its_own_data_is_damaged_as_well(newest: int, good: int) -> None:
    """A fault was seen late: states were kept in between, and they look sound by their step alone."""
    made = incident()
    made.observe(61, 6.0, 1.0)
    asked: list[tuple[int, int]] = []

    def is_damaged(*steps: int) -> bool:
        asked.append(steps)  # type: ignore[arg-type]
        return True

    first = made.rule(61, [6.0], {newest: [5.9], good: [1.6]}, is_asked=False, is_damaged=is_damaged)
    second = made.rule(62, [6.1], {newest: [5.9], good: [1.6]}, is_asked=False, is_damaged=is_damaged)
    assert "act" in (first.act, second.act)
    assert (second.cause, second.good_step) == ("weights", good)
    assert asked[0] == (newest, good)


def test_a_loss_that_begins_at_zero_and_grows_fast_is_no_objective() -> None:
    """A distance to a reference grows within the first few steps."""
    range_ = LossRange()
    for step in range(40):
        range_.observe(0.01 * step**1.5, None)
    assert not range_.is_objective


def test_a_state_that_knows_the_batches_is_taken_although_the_damage_grows() -> None:
    """The losses of two looks differ by more than their noise: that is the damage, not the data."""
    made = incident()
    made.observe(61, 2.7, 1.0)
    made.rule(61, [2.3], {58: [1.7]}, is_asked=False)
    ruling = made.rule(62, [6.3], {58: [1.5]}, is_asked=False)
    assert (ruling.act, ruling.cause, ruling.good_step) == ("act", "weights", 58)


def test_damage_that_halves_from_step_to_step_is_not_undone() -> None:
    made = incident()
    made.observe(61, 2.4, 1.0)
    gain = 0.7
    for step in range(61, 64):
        assert made.rule(step, [1.65 + gain], {60: [1.65]}, is_asked=False).act == "none"
        gain *= 0.5
    assert made.rule(64, [1.65], {60: [1.65]}, is_asked=False).act != "act"


def test_where_damage_has_healed_by_itself_even_large_damage_gets_more_looks() -> None:
    made = incident()
    made.observe(61, 2.4, 1.0)
    made.rule(61, [2.3], {60: [1.6]}, is_asked=False)
    made.rule(62, [1.6], {60: [1.6]}, is_asked=False)
    acts = [made.rule(step, [6.0], {60: [1.6]}, is_asked=False).act for step in range(63, 67)]
    assert acts == ["none", "none", "none", "act"]


def test_what_passing_data_leave_stays_where_much_was_learnt_since() -> None:
    made = incident()
    made.observe(61, 6.0, 1.0)
    for step in (61, 64, 69, 79):
        made.rule(step, [6.0], {60: [6.1]}, is_asked=False)
    assert made.rule(115, [2.7], {60: [1.65]}, is_asked=False).act == "dismiss"
    assert not made.is_open


def test_data_that_seem_to_have_passed_are_looked_at_at_once() -> None:
    made = incident()
    for step in (61, 64, 69):
        made.observe(step, 6.0, 1.0)
        made.rule(step, [6.0], {60: [6.1]}, is_asked=False)
    assert made.next_look == 79
    made.observe(70, 2.6, 1.0)
    made.observe(71, 2.5, 1.0)
    assert made.is_due(71)


def test_data_that_pass_sooner_than_the_run_can_learn_leave_what_they_left() -> None:
    """A block of new data that lasts no longer than the first learning took cannot be distinguished from bad data."""
    made = incident(steps_to_learn=40)
    made.observe(61, 6.0, 1.0)
    for step in (61, 64, 69):
        made.rule(step, [6.0], {60: [6.1]}, is_asked=False)
    assert made.rule(79, [3.0], {60: [1.65]}, is_asked=False).act == "dismiss"
    assert not made.is_open


def restored() -> Incident:
    """Return an incident that a rollback has not ended: damage is there again, but not for certain."""
    made = incident()
    made.observe(61, 6.0, 1.0)
    made.rule(61, [6.0], {60: [1.6]}, is_asked=False)
    made.has_restored(61)
    for step in (62, 64):
        assert made.rule(step, [1.6], {60: [1.6]}, is_asked=False).act == "dismiss"
    return made


def test_damage_that_comes_again_after_a_rollback_may_go_up_and_down() -> None:
    """Under a fault that lasts the losses jump: less damage than at the look before does not mean that it heals."""
    made = restored()
    assert made.rule(68, [3.8], {60: [1.6]}, is_asked=False).act == "none"
    assert made.rule(69, [2.6], {60: [1.6]}, is_asked=False).act == "none"
    assert made.rule(70, [3.0], {60: [1.6]}, is_asked=False).act == "act"


def test_nothing_is_kept_while_damage_is_looked_at_again() -> None:
    made = restored()
    assert not made.is_suspicious
    made.rule(68, [3.8], {60: [1.6]}, is_asked=False)
    assert made.is_suspicious


def test_what_was_learnt_since_overrules_damage() -> None:
    made = incident()
    made.observe(61, 6.0, 1.0)
    ruling = made.rule(61, [6.0], {58: [1.6]}, is_asked=False)
    assert ruling.act == "act"
    overruled = made.overrule(61, ruling)
    assert (overruled.act, overruled.cause, made.cause, made.next_look) == ("dismiss", "data", "data", 64)
