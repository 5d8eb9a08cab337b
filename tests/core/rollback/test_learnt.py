"""Going back costs what was learnt since: an older state that knows the data of now is not better for that alone."""

from __future__ import annotations

import pytest

from hf_divguard.core.rollback.comparison import Pair
from hf_divguard.core.rollback.learnt import has_learnt_since
from hf_divguard.core.rollback.loss_range import LossRange, Usual
from hf_divguard.core.rollback.pairs import PairsByState

USUAL = Usual(level=1.6, spread=0.1, first=3.5)


@pytest.mark.parametrize(
    ("pairs", "has_learnt"),
    [
        pytest.param(
            [(2.0, 3.4), (1.9, 3.1), (2.6, 1.6), (2.7, 1.5)], True, id="the data went there and back"
        ),
        pytest.param(
            [(4.0, 1.7), (4.4, 1.6), (3.9, 1.5)], False, id="damaged weights do worse on everything"
        ),
        pytest.param([(1.5, 1.9), (4.4, 1.6), (3.9, 1.5)], False, id="one batch alone"),
        pytest.param(
            [(1.6, 1.65), (1.55, 1.6), (1.7, 1.75)], False, id="a little better, as after some steps more"
        ),
        pytest.param([(3.0, 9.0), (2.9, 8.0)] + [(4.4, 1.6)] * 8, False, id="few of many"),
        pytest.param([], False, id="no batches"),
    ],
)
def test_damage_shows_on_what_was_trained_since(pairs: list[tuple[float, float]], has_learnt: bool) -> None:
    assert has_learnt_since([Pair(*pair) for pair in pairs], USUAL) is has_learnt


def test_data_that_nobody_can_learn_are_no_knowledge() -> None:
    """Weights that follow random labels come to the loss of the untrained model, not below it."""
    random_labels = [Pair(3.6, 9.0), Pair(3.5, 8.5), Pair(2.6, 1.6)]
    new_data = [Pair(2.6, 9.0), Pair(2.5, 8.5), Pair(2.6, 1.6)]
    assert not has_learnt_since(random_labels, USUAL, is_after_data=True)
    assert has_learnt_since(new_data, USUAL, is_after_data=True)


def test_little_knowledge_counts_against_little_damage() -> None:
    pairs = [Pair(1.6, 1.7), Pair(1.5, 1.6)]
    assert not has_learnt_since(pairs, USUAL)
    assert has_learnt_since(pairs, USUAL, is_small=True)


def test_the_steps_that_a_run_takes_to_learn_something_are_counted() -> None:
    range_ = LossRange()
    for step in range(1, 41):
        range_.observe(3.0 if step <= 20 else 2.0, None)
    assert range_.steps_to_learn == 23
    plateau = LossRange()
    for _ in range(40):
        plateau.observe(3.0, None)
    assert plateau.steps_to_learn == float("inf")


def test_losses_are_collected_by_state() -> None:
    pairs = PairsByState()
    pairs.add([5.0, 5.0], {40: [5.0, 5.0], 20: [1.5, 1.6]})
    asked: list[tuple[int, int]] = []
    assert pairs.shows_a_turn(20, 42, lambda *steps: bool(asked.append(steps)))  # type: ignore[func-returns-value, arg-type]
    assert asked == [(40, 20)]
    assert not pairs.shows_a_turn(20, 42, lambda newest, good: True)
    assert not pairs.shows_a_turn(20, 41, lambda newest, good: False)
    assert not pairs.shows_a_turn(40, 42, lambda newest, good: False)
    pairs.add([5.0], {20: [1.4]})
    assert list(pairs.means()) == [20]
    assert pairs.of(20) == [Pair(5.0, 1.5), Pair(5.0, 1.6), Pair(5.0, 1.4)]
    pairs.clear()
    assert pairs.most == 0
