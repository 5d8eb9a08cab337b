"""The non-finite rule: NaN, what stands in for it, and what an fp16 scaler does on purpose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from hf_divguard.core.detection.nonfinite import NonFiniteRule
from hf_divguard.core.findings import Finding

NAN, INF = math.nan, math.inf


def findings_of(
    rows: Sequence[tuple[float, float | None]], *, every: int = 1, **params: Any
) -> list[Finding]:
    rule = NonFiniteRule(**params)
    found = [rule.observe((i + 1) * every, loss, norm) for i, (loss, norm) in enumerate(rows)]
    return [finding for finding in found if finding is not None]


def summary(found: list[Finding]) -> list[tuple[int, int, str, str]]:
    return [(finding.step, finding.onset_step, finding.kind, finding.severity) for finding in found]


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_a_loss_that_is_not_finite_is_an_error_once_per_incident(value: float) -> None:
    rows = [(2.0, 1.0), (value, 1.0), (value, 1.0), (2.0, 1.0), (value, 1.0)]
    assert summary(findings_of(rows)) == [(2, 2, "non_finite", "error"), (5, 5, "non_finite", "error")]


def test_without_gradient_norms_the_step_before_may_be_the_bad_one() -> None:
    assert summary(findings_of([(2.0, None), (NAN, None)])) == [(2, 1, "non_finite", "error")]


def test_with_averaged_logs_the_fault_may_be_anywhere_since_the_last_good_entry() -> None:
    assert summary(findings_of([(2.0, 1.0), (NAN, 1.0)], every=10)) == [(20, 11, "non_finite", "error")]


def test_zero_beside_a_gradient_that_is_not_finite_is_a_mask() -> None:
    assert summary(findings_of([(2.0, 1.0), (0.0, NAN), (0.0, NAN)])) == [(2, 2, "nan_filtered", "error")]


def test_the_onset_of_a_mask_is_the_first_bad_gradient() -> None:
    assert summary(findings_of([(2.0, 1.0), (2.1, NAN), (0.0, NAN)])) == [
        (2, 2, "scaler_skip", "note"),
        (3, 2, "nan_filtered", "error"),
    ]


def test_a_loss_that_freezes_beside_a_bad_gradient_is_a_mask() -> None:
    found = findings_of([(2.0, 1.0), (1.9, 1.0), (1.95, NAN), (1.95, NAN), (1.95, NAN)])
    assert summary(found)[-1] == (5, 3, "nan_filtered", "error")
    assert "frozen at 1.95" in found[-1].message


def test_zero_from_the_start_is_a_loss_like_any_other() -> None:
    assert findings_of([(0.0, 1.0)] * 30) == []


def test_an_abrupt_end_at_zero_is_a_mask_where_no_gradient_is_known() -> None:
    falling = [(2.0 - 0.1 * t, None) for t in range(6)]
    assert summary(findings_of(falling + [(0.0, None)] * 9)) == [(9, 6, "nan_filtered", "error")]


@pytest.mark.parametrize("norm", [None, 0.0, 1.0], ids=["absent", "zero", "constant"])
def test_a_loss_that_dies_at_zero_is_found_whatever_the_gradient_norm(
    norm: float | None,
) -> None:
    found = findings_of([(2.0, 1.0)] * 10 + [(0.0, norm)] * 9)
    assert [(finding.step, finding.kind) for finding in found] == [(13, "nan_filtered")]


@pytest.mark.parametrize("norm", [None, 0.0, 1.0], ids=["absent", "zero", "constant"])
def test_two_means_of_exactly_zero_are_enough(norm: float | None) -> None:
    """Each entry of a log is the mean of many steps; a person needs no more of them."""
    found = findings_of([(2.0, 1.0)] * 7 + [(0.0, norm)] * 2, every=50)
    assert [finding.kind for finding in found] == ["nan_filtered"]


def test_fewer_values_before_the_zeros_ask_for_more_zeros() -> None:
    found = findings_of([(0.03, None)] + [(0.0, None)] * 20)
    assert [finding.step for finding in found] == [9]


@pytest.mark.parametrize(
    "before",
    [
        [0.3, 0.0, 0.2, 0.1, 0.0, 0.2, 0.3],
        [0.04, -0.01, 0.02, -0.03, 0.02, 0.01, -0.02, 0.03],
        [1.0, 0.7, 0.5, 0.3, 0.04, 0.6, 0.5, 0.4, 0.5],
    ],
    ids=["hinge", "policy gradient", "near zero before"],
)
def test_a_loss_that_reaches_zero_by_itself_is_not_a_mask(before: list[float]) -> None:
    assert findings_of([(value, 1.0) for value in before] + [(0.0, 1.0)] * 30) == []


def test_a_metric_that_should_rise_is_not_masked_by_zeros() -> None:
    assert findings_of([(0.9, None)] * 20 + [(0.0, None)] * 20, metric_key="eval_accuracy") == []


def test_a_loss_that_is_learnt_down_to_zero_is_not_a_mask() -> None:
    falling = [(round(2.0 * 0.7**t, 4), None) for t in range(40)]
    assert findings_of(falling) == []


def test_a_loss_that_was_zero_from_the_start_is_not_a_mask() -> None:
    assert findings_of([(0.0, None)] * 30) == []


def test_a_scaler_that_searches_its_scale_is_only_noted() -> None:
    rows = [(2.0 + 0.01 * t, NAN if t < 16 else 1.0) for t in range(40)]
    assert summary(findings_of(rows)) == [(1, 1, "scaler_skip", "note")]


def test_a_gradient_that_stays_bad_is_an_error() -> None:
    rows = [(2.0 + 0.01 * t, INF if t >= 10 else 1.0) for t in range(40)]
    found = findings_of(rows)
    assert summary(found) == [(11, 11, "scaler_skip", "note"), (27, 11, "non_finite", "error")]
    assert found[-1].metric == "grad_norm"


def test_skips_now_and_then_are_only_noted() -> None:
    rows = [(2.0 + 0.01 * t, NAN if t % 20 == 0 else 1.0) for t in range(200)]
    assert {finding.severity for finding in findings_of(rows, every=10)} == {"note"}


def test_without_a_scaler_the_first_bad_gradient_is_an_error() -> None:
    assert summary(findings_of([(2.0, 1.0), (2.1, NAN)], scaler_patience=1)) == [
        (2, 2, "non_finite", "error")
    ]


def test_a_nan_loss_with_a_gradient_of_zero_harms_nothing_unless_it_goes_on() -> None:
    assert summary(findings_of([(2.0, 1.0), (NAN, 0.0), (2.0, 1.0)])) == [(2, 2, "non_finite", "note")]
    assert summary(findings_of([(2.0, 1.0)] + [(NAN, 0.0)] * 3))[-1][2:] == ("non_finite", "error")


def test_an_evaluation_loss_that_is_not_finite_is_an_error_once_per_set() -> None:
    rule = NonFiniteRule()
    found = [
        rule.observe_eval(1, NAN),
        rule.observe_eval(2, NAN),
        rule.observe_eval(2, NAN, metric_key="eval_web_loss"),
    ]
    assert [finding and finding.metric for finding in found] == ["eval_loss", None, "eval_web_loss"]
    assert rule.observe_eval(3, 2.0) is None
    assert rule.observe_eval(4, INF) is not None
