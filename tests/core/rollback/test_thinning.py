"""A few states, of which one is always old enough to be from before a fault and none much older than that."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_divguard.core.rollback.thinning import next_to_drop


@given(every=st.integers(1, 60), reach=st.integers(0, 100), count=st.integers(5, 400))
def test_one_state_is_always_old_enough_and_the_last_two_stay(every: int, reach: int, count: int) -> None:
    """Whatever the distance between states, at every step up to the next one."""
    kept: list[int] = []
    for number in range(1, count + 1):
        step = number * every
        kept.append(step)
        if len(kept) > 4:
            kept.remove(next_to_drop(kept, reach))
        assert kept == sorted(kept)
        assert kept[-2:] == [step - every, step][-len(kept) :]
        if step >= 2 * reach + 2 * every and len(kept) == 4:
            assert any(reach <= step - old <= 2 * reach + 2 * every for old in kept)


def test_states_that_are_far_apart_go_in_the_order_of_their_age() -> None:
    """Two intervals are longer than what has to be reached back."""
    assert next_to_drop([100, 200, 300, 400], 40) == 100


def test_states_that_are_close_together_leave_the_old_one_where_it_is() -> None:
    """Its successor is not old enough yet."""
    assert next_to_drop([100, 130, 134, 136, 138], 40) == 134


def distances(delay: int, seen_after: int) -> list[int]:
    """Return, at each step, how old the newest state is that is from before a fault of ``seen_after`` steps ago."""
    kept: list[int] = []
    found = []
    for step in range(1000):
        if step % 5 == 0:
            kept.append(step)
            if len(kept) > 4:
                kept.remove(next_to_drop(kept, 60, delay))
        if step >= 200:
            found.append(step - max(old for old in kept if old <= step - seen_after))
    return found


def test_where_faults_are_found_late_a_state_from_shortly_before_one_is_kept() -> None:
    """Spread over their ages, four states lose half as many steps as the last two and two old ones."""
    spread, newest = distances(10, 11), distances(1, 11)
    assert sum(spread) / len(spread) < 0.7 * sum(newest) / len(newest)
    assert max(spread) <= max(newest)


@given(every=st.integers(1, 60), delay=st.integers(2, 100), count=st.integers(5, 400))
def test_spread_states_reach_as_far_back_as_wanted_and_hold_the_newest(
    every: int, delay: int, count: int
) -> None:
    """Whatever the distance between states and the delay."""
    kept: list[int] = []
    reach = 60
    for number in range(1, count + 1):
        step = number * every
        kept.append(step)
        if len(kept) > 4:
            kept.remove(next_to_drop(kept, reach, delay))
        assert kept == sorted(kept)
        assert kept[-1] == step
        if number >= 4 and step - every >= reach:
            assert step - kept[0] >= reach
