"""Losses that are so high that no second look is needed."""

from __future__ import annotations

import pytest

from hf_divguard.core.rollback.comparison import is_ruin
from hf_divguard.core.rollback.loss_range import LossRange, Usual

USUAL = Usual(level=0.4, spread=0.2, first=2.3)


@pytest.mark.parametrize(
    ("present", "kept", "expected"),
    [
        (13.7, 0.5, True),
        (float("inf"), 0.5, True),
        (2.4, 0.5, False),
        # Where the kept weights do badly too, it is not the weights alone.
        (13.7, 4.9, False),
        (13.7, 2.1, False),
        (13.7, 1.3, True),
    ],
)
def test_ruin_is_damage_that_the_kept_weights_do_not_have(
    present: float, kept: float, expected: bool
) -> None:
    assert is_ruin(present, kept, USUAL) is expected


def test_the_earlier_level_is_known_after_thirty_losses() -> None:
    losses = LossRange()
    for step in range(29):
        losses.observe(3.0 + 0.01 * (step % 3), None)
    assert losses.earlier == float("inf")
    for step in range(40):
        losses.observe(3.0 + 0.01 * (step % 3), None)
    assert losses.earlier == pytest.approx(3.01)
