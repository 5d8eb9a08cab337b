"""Damage that heals by itself, and damage that heals too slowly to wait for."""

from __future__ import annotations

import pytest

from hf_divguard.core.rollback.healing import costs_more_than_steps
from hf_divguard.core.rollback.incident import Incident
from hf_divguard.core.rollback.pairs import PairsByState

SLOW = [0.95 - 0.05 * step for step in range(12)]
FAST = [1.6 * 0.6**step for step in range(12)]


@pytest.mark.parametrize(
    ("gains", "age", "expected"),
    [
        (SLOW[:8], 8, True),
        (FAST[:8], 8, False),
        ([0.5] * 8, 500, True),  # it does not heal at all
        (SLOW[:8], 200, False),  # a rollback would lose more steps than that
        (SLOW[:7], 8, False),  # too few to say
        ([0.1] * 8, 1, False),  # nothing to speak of
        ([float("inf")] * 8, 8, True),
        ([0.5, 0.6, -0.1, 0.9, 3.0, 5.0, 4.0, 2.0], 8, False),  # up and down, as at a high rate
    ],
)
def test_going_back_is_worth_it_where_damage_heals_more_slowly(
    gains: list[float], age: int, expected: bool
) -> None:
    assert costs_more_than_steps(list(enumerate(gains)), least=0.2, age=age) is expected


def test_looks_that_are_far_apart_show_that_damage_heals_more_slowly() -> None:
    apart = [(5 * number, gain) for number, gain in enumerate(FAST[:8])]
    assert costs_more_than_steps(apart, least=0.02, age=5)
    assert not costs_more_than_steps(list(enumerate(FAST[:8])), least=0.02, age=5)


def test_many_micro_batches_of_one_look_do_not_show_how_fast_damage_heals() -> None:
    pairs = PairsByState()
    pairs.add([2.0, 3.0, 2.5, 2.5], {40: [1.0, 2.0, 1.5, 1.5]}, at=50)
    pairs.add([2.0, 2.0, 2.0, 2.0], {40: [1.5, 1.5, 1.5, 1.5]}, at=53)
    assert pairs.gains_by_step(40) == [(50, 1.0), (53, 0.5)]
    pairs.add([2.0], {40: [1.5], 20: [1.0]}, at=54)
    assert pairs.gains_by_step(20) == [(54, 1.0)]
    assert pairs.most == 9


def test_a_small_rise_over_several_steps_does_not_make_one_look_enough() -> None:
    incident = Incident(watches_small=True)
    for step in range(80):
        incident.observe(step, 1.5 + 0.02 * (-1) ** step + (0.13 if step >= 60 else 0.0), None)
        if incident.is_open:
            assert incident.rule(step, [1.9] * 8, {40: [1.5] * 8}, is_asked=False).act == "none"
            return
    raise AssertionError("no incident was opened")


def _look_at(gains: list[float], incident: Incident, start: int) -> int | None:
    """Return after how many looks the incident asks for a rollback."""
    for number, gain in enumerate(gains):
        step = start + number
        incident.observe(step, 1.5 + gain, None)
        if not incident.is_due(step):
            continue
        kept = 1.5 + 0.02 * (-1) ** number
        ruling = incident.rule(step, [kept + gain], {start - 3: [kept]}, is_asked=False)
        if ruling.act == "act":
            return number + 1
    return None


def _healthy_incident(steps: int) -> Incident:
    """Return one of a run whose loss is about 1.5, after it was higher for some steps."""
    incident = Incident()
    for step in range(steps):
        incident.observe(step, 1.5 + 0.02 * (-1) ** step + (1.5 if step < 5 else 0.0), None)
    return incident


def _incident_after_spikes() -> Incident:
    """Return an incident of a run in which a spike has healed before."""
    incident = _healthy_incident(40)
    assert _look_at([1.6, 0.8, 0.4, 0.1, 0.0, 0.0, 0.0, 0.0], incident, 40) is None
    for step in range(48, 60):
        incident.observe(step, 1.5 + 0.02 * (-1) ** step, None)
    assert incident._healing.further_looks(60) > 0
    return incident


def test_slow_damage_is_not_waited_for_long_because_a_spike_has_healed_before() -> None:
    incident = _incident_after_spikes()
    gains = [1.4 - 0.06 * step + 0.2 * (-1) ** step for step in range(16)]
    found = _look_at(gains, incident, 60)
    assert found is not None
    assert found <= 10


def test_a_second_spike_that_heals_is_left_alone() -> None:
    incident = _incident_after_spikes()
    assert _look_at([*FAST, 0.0, 0.0, 0.0, 0.0], incident, 60) is None


def test_states_that_are_older_and_worse_are_compared_no_more() -> None:
    pairs = PairsByState()
    losses = {40: 1.5, 20: 2.0, 5: 2.5}
    for _ in range(2):
        pairs.add([5.0], {step: [loss] for step, loss in losses.items()})
        assert all(pairs.needs(step, 0.05) for step in losses)
    pairs.add([5.0], {step: [loss] for step, loss in losses.items()})
    assert [step for step in losses if pairs.needs(step, 0.05)] == [40]
    pairs.add([5.0], {40: [1.5]})
    assert pairs.means() == {40: 1.5}
    assert pairs.has_older(40)
    assert not pairs.needs(20, 0.05)
    assert not pairs.needs(1, 0.05)


def test_an_older_state_that_does_better_stays_in_question() -> None:
    pairs = PairsByState()
    for _ in range(4):
        pairs.add([5.0], {40: [4.0], 20: [1.5], 5: [2.5]})
    assert [step for step in (40, 20, 5) if pairs.needs(step, 0.05)] == [40, 20]


def test_a_state_that_was_compared_later_is_judged_on_the_same_batches() -> None:
    pairs = PairsByState()
    pairs.add([9.0], {40: [6.0]})
    for _ in range(2):
        pairs.add([2.0], {40: [1.0], 20: [1.5]})
    assert pairs.means() == {40: 1.0, 20: 1.5}


def test_a_loss_that_rises_again_after_a_rollback_is_not_taken_for_data_that_are_learnt() -> None:
    """It is far below that of the start, and not yet clearly above that of the kept weights."""
    incident = Incident()
    for step in range(60):
        incident.observe(step, 6.0 if step < 5 else 1.6 + 0.02 * (-1) ** step, None)
    incident.observe(60, 9.5, None)
    assert incident.rule(60, [9.5], {55: [1.6]}, is_asked=False).act == "act"
    incident.has_restored(60)
    for step in range(61, 70):
        loss = 1.6 if step < 66 else 1.9
        incident.observe(step, loss, None)
        if incident.is_due(step):
            assert incident.rule(step, [loss], {55: [1.65]}, is_asked=False).act != "act"
    assert incident.is_open
    assert incident.new_data_until == -1
    step = incident.next_look or 0
    incident.observe(step, 3.0, None)
    rulings = [incident.rule(step + more, [3.0], {55: [1.65]}, is_asked=False) for more in range(4)]
    assert "act" in [ruling.act for ruling in rulings]


def test_a_state_from_just_after_a_rollback_is_no_target_where_an_older_one_does_as_well() -> None:
    incident = _healthy_incident(60)
    incident.observe(60, 9.5, None)
    assert incident.rule(60, [9.5], {55: [1.5]}, is_asked=False).act == "act"
    incident.has_restored(60)
    for kept, target in (({64: [1.5], 55: [1.5]}, 55), ({64: [1.5], 55: [2.4]}, 64)):
        ruling = incident.rule(66, [9.5], kept, is_asked=False)
        assert (ruling.act, ruling.good_step) == ("act", target)
        incident.has_restored(66)
        incident.last_restore = 60


def test_a_rollback_to_before_bad_data_that_were_usual_makes_the_range_that_of_before() -> None:
    incident = _healthy_incident(60)
    for step in range(60, 66):
        incident.observe(step, 5.0, None)
    incident.take_as_usual(66)
    assert incident.range.usual.level == 5.0
    incident.has_restored(70)
    assert (incident.new_data_until, incident.range.usual.level) == (66, 5.0)
    incident.has_restored(70, before_data=55)
    assert incident.new_data_until == -1
    assert incident.range.usual.level < 1.6
