"""Settings and memory of the two detectors with averages are attributes, equal to their state."""

from __future__ import annotations

import math

import pytest
from transformers import TrainerControl

from hf_divguard import DualTimeScaleDivergenceDetector, DualWindowDivergenceDetector


def feed(detector: object, *values: float) -> None:
    for value in values:
        detector.on_evaluate(None, None, TrainerControl(), metrics={"eval_loss": value})  # type: ignore[attr-defined]


def test_the_settings_of_the_averages_are_attributes() -> None:
    detector = DualTimeScaleDivergenceDetector(0.2, 0.02, 3.0, "abort", False, "eval_f1", True)
    assert (detector.short_alpha, detector.long_alpha, detector.threshold) == (0.2, 0.02, 3.0)
    assert (detector.action, detector.use_eval_loss, detector.metric_key) == ("abort", False, "eval_f1")


def test_the_settings_of_the_windows_are_attributes() -> None:
    detector = DualWindowDivergenceDetector(3, 7, 1.5)
    assert (detector.short_window, detector.long_window, detector.threshold) == (3, 7, 1.5)
    assert (detector.action, detector.use_eval_loss, detector.metric_key) == ("stop", True, "eval_loss")


def test_before_the_first_value_the_averages_are_none_and_the_buffers_empty() -> None:
    averages, windows = DualTimeScaleDivergenceDetector(), DualWindowDivergenceDetector()
    assert (averages.short_ema, averages.long_ema, averages.initialized) == (None, None, False)
    assert (windows.short_buffer, windows.long_buffer) == ([], [])


def test_the_averages_follow_the_values_and_equal_the_state() -> None:
    detector = DualTimeScaleDivergenceDetector(0.5, 0.1)
    feed(detector, 2.0, 4.0, math.nan)
    assert (detector.short_ema, detector.long_ema, detector.initialized) == (3.0, pytest.approx(2.2), True)
    names = ("short_ema", "long_ema", "initialized")
    assert detector.state_dict() == {name: getattr(detector, name) for name in names}


def test_loaded_averages_are_shown_as_they_were_loaded() -> None:
    detector = DualTimeScaleDivergenceDetector()
    state = {"short_ema": 2.5, "long_ema": 1.5, "initialized": True}
    detector.load_state_dict(state)
    assert detector.state_dict() == state
    assert (detector.short_ema, detector.long_ema, detector.initialized) == (2.5, 1.5, True)
    detector.load_state_dict({"short_ema": None, "long_ema": None, "initialized": False})
    assert detector.short_ema is None


@pytest.mark.parametrize("lengths", [(0, 0), (1, 3), (2, 5), (9, 30)], ids=str)
def test_loaded_buffers_of_any_length_are_shown_as_they_were_loaded(lengths: tuple[int, int]) -> None:
    detector = DualWindowDivergenceDetector(2, 5)
    state = {
        "short_buffer": [float(n) for n in range(lengths[0])],
        "long_buffer": [float(n) for n in range(lengths[1])],
    }
    detector.load_state_dict(state)
    assert detector.state_dict() == state
    assert (detector.short_buffer, detector.long_buffer) == (state["short_buffer"], state["long_buffer"])
    feed(detector, 7.0)
    assert detector.short_buffer == [*state["short_buffer"], 7.0][-2:]
    assert detector.long_buffer == [*state["long_buffer"], 7.0][-5:]
    assert detector.state_dict() == {
        "short_buffer": detector.short_buffer,
        "long_buffer": detector.long_buffer,
    }
