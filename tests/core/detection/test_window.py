"""The two-windows rule."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from hf_divguard.core.detection.window import DualWindowRule


def test_it_is_silent_until_the_long_window_is_full() -> None:
    rule = DualWindowRule(2, 6, threshold=1.0)
    found = [rule.observe(step, 0.0 if step < 3 else 9.0) for step in range(6)]
    assert [finding.step for finding in found if finding] == [5]


def test_the_gap_is_that_of_the_two_means() -> None:
    rule = DualWindowRule(2, 4, threshold=1.0)
    for step, value in enumerate([1.0, 2.0, 3.0]):
        rule.observe(step, value)
    finding = rule.observe(3, 8.0)
    assert finding is not None
    assert finding.evidence == {"short_mean": 5.5, "long_mean": 3.5, "gap": 2.0}


def test_the_means_are_exact_after_thousands_of_values() -> None:
    rule = DualWindowRule(3, 7, threshold=5e-324)
    rng = random.Random(0)
    kept: list[float] = []
    found = 0
    for step in range(5000):
        value = rng.gauss(0.0, 1.0) * 10.0 ** rng.randint(-150, 150)
        kept = [*kept, value][-7:]
        if (finding := rule.observe(step, value)) is not None:
            found += 1
            assert finding.evidence["long_mean"] == float(sum(map(Fraction, kept)) / 7)
    assert found > 1000


def test_a_value_that_is_not_finite_leaves_the_windows_as_they_were() -> None:
    rule, same = DualWindowRule(2, 4), DualWindowRule(2, 4)
    for step, value in enumerate([1.0, math.nan, 2.0, math.inf, 3.0]):
        rule.observe(step, value)
        if math.isfinite(value):
            same.observe(step, value)
    assert rule.state_dict() == same.state_dict()


def test_a_drop_is_the_trouble_where_greater_is_better() -> None:
    rule = DualWindowRule(2, 4, threshold=0.1, metric_key="eval_f1", greater_is_better=True)
    found = [rule.observe(step, value) for step, value in enumerate([0.9, 0.9, 0.9, 0.9, 0.5, 0.5])]
    assert [finding.kind for finding in found if finding] == ["drop", "drop"]


def test_loaded_buffers_stay_as_they_are_until_the_next_value() -> None:
    long, short = DualWindowRule(2, 6), DualWindowRule(1, 3)
    for step in range(6):
        long.observe(step, float(step))
    short.load_state_dict(long.state_dict())
    assert short.state_dict() == long.state_dict()
    assert (short.short_buffer, short.long_buffer) == ([4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    finding = short.observe(6, 12.0)
    assert short.state_dict() == {"short_buffer": [12.0], "long_buffer": [4.0, 5.0, 12.0]}
    assert finding is not None
    assert finding.evidence == {"short_mean": 12.0, "long_mean": 7.0, "gap": 5.0}


def test_the_buffers_are_empty_lists_before_the_first_value() -> None:
    rule = DualWindowRule()
    assert (rule.short_buffer, rule.long_buffer) == ([], [])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"short_window": 0}, ValueError, "`short_window` must be at least 1 value, got 0"),
        ({"long_window": 2.5}, TypeError, "`long_window` must be a whole number of values, got 2.5"),
        ({"threshold": math.inf}, ValueError, "`threshold` must be a finite number above 0, got inf"),
        ({"threshold": 0.0}, ValueError, "`threshold` must be a finite number above 0, got 0.0"),
        ({"threshold": None}, TypeError, r"`threshold` must be a number, got None \(detector 'window'\)"),
        ({"long_window": None}, TypeError, "`long_window` must be a whole number of values, got None"),
    ],
)
def test_a_setting_out_of_range_is_refused(
    params: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DualWindowRule(**params)  # type: ignore[arg-type]


def test_windows_the_wrong_way_round_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="should be smaller than"):
        DualWindowRule(10, 5)


@pytest.mark.parametrize("buffer", ["text", None, [1.0, None], [math.nan]], ids=repr)
def test_a_memory_that_is_not_made_of_finite_numbers_is_refused(buffer: object) -> None:
    with pytest.raises(ValueError, match="long_buffer"):
        DualWindowRule().load_state_dict({"short_buffer": [1.0], "long_buffer": buffer})
