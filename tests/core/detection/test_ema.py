"""The two-averages rule."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hf_divguard.core.detection.ema import DualTimeScaleRule


def test_the_averages_begin_at_the_first_value_and_follow_their_formula() -> None:
    rule = DualTimeScaleRule(0.5, 0.25, threshold=10.0)
    for step, value in enumerate([4.0, 2.0, 0.0]):
        rule.observe(step, value)
    assert (rule.short_ema, rule.long_ema) == (1.5, 2.625)


@pytest.mark.parametrize(("height", "fires"), [(2.82, False), (2.84, True)])
def test_the_smallest_jump_it_sees_is_the_threshold_over_its_peak_response(
    height: float, fires: bool
) -> None:
    rule = DualTimeScaleRule()
    found = [rule.observe(step, 2.0 if step < 50 else 2.0 + height) for step in range(200)]
    assert any(found) is fires


def test_it_repeats_itself_while_the_gap_lasts() -> None:
    rule = DualTimeScaleRule(threshold=1.0)
    found = [rule.observe(step, 2.0 if step < 5 else 6.0) for step in range(12)]
    assert [finding.step for finding in found if finding] == [8, 9, 10, 11]


def test_a_drop_is_the_trouble_where_greater_is_better() -> None:
    rule = DualTimeScaleRule(threshold=0.2, metric_key="eval_accuracy", greater_is_better=True)
    found = [rule.observe(step, 0.9 if step < 50 else 0.4) for step in range(70)]
    first = next(finding for finding in found if finding)
    assert (first.kind, first.metric) == ("drop", "eval_accuracy")
    rising = DualTimeScaleRule(threshold=0.2, greater_is_better=True)
    assert not any(rising.observe(step, 0.4 if step < 50 else 0.9) for step in range(70))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"short_alpha": 0.0}, ValueError, "`short_alpha` must be above 0 and at most 1, got 0.0"),
        ({"long_alpha": 1.5}, ValueError, "`long_alpha` must be above 0 and at most 1, got 1.5"),
        ({"threshold": math.nan}, ValueError, "`threshold` must be a finite number above 0, got nan"),
        ({"threshold": -1.0}, ValueError, "`threshold` must be a finite number above 0, got -1.0"),
        ({"threshold": None}, TypeError, r"`threshold` must be a number, got None \(detector 'ema'\)"),
        ({"short_alpha": "0.1"}, TypeError, "`short_alpha` must be a number, got '0.1'"),
        ({"threshold": True}, TypeError, "`threshold` must be a number, got True"),
    ],
)
def test_a_setting_out_of_range_is_refused(
    params: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DualTimeScaleRule(**params)


def test_the_averages_are_unknown_before_the_first_value_and_equal_the_saved_state() -> None:
    rule = DualTimeScaleRule()
    assert (rule.short_ema, rule.long_ema, rule.initialized) == (None, None, False)
    rule.observe(1, 2.0)
    saved = {"short_ema": 2.5, "long_ema": 3, "initialized": True}
    rule.load_state_dict(saved)
    assert (
        rule.state_dict()
        == saved
        == {"short_ema": rule.short_ema, "long_ema": rule.long_ema, "initialized": True}
    )


def test_averages_the_wrong_way_round_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="should be greater than"):
        DualTimeScaleRule(0.01, 0.1)


def test_a_memory_without_finite_averages_is_refused() -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        DualTimeScaleRule().load_state_dict({"short_ema": None, "long_ema": 1.0, "initialized": True})
