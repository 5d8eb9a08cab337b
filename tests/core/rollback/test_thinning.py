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
