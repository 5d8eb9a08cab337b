"""Every rule keeps the same promises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from hf_divguard.core.detection.detector import Rule
from hf_divguard.core.detection.registry import RULES, make_rule
from hf_divguard.core.findings import SEVERITIES, Finding
from tests import curves

SEEDS = range(12)
LEVEL_RULES = ["adaptive", "ema", "window"]
# Values after the onset within which a rise of 4 in a loss that fell from 5 to 2 is reported; `docs/detectors.md`.
STATED_DELAY = {"adaptive": 7, "ema": 20, "window": 9}


def findings_of(rule: Rule, values: list[float], first_step: int = 0) -> list[Finding]:
    return [
        found
        for step, value in enumerate(values, first_step)
        if (found := rule.observe(step, value)) is not None
    ]


def errors_of(rule: Rule, values: list[float]) -> list[Finding]:
    return [finding for finding in findings_of(rule, values) if finding.severity == "error"]


@pytest.fixture(params=sorted(RULES))
def make(request: pytest.FixtureRequest) -> Callable[..., Rule]:
    return lambda **params: make_rule(request.param, **params)


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize(
    "curve", [curves.healthy, curves.flat, curves.negative, curves.stairs], ids=lambda c: c.__name__
)
def test_a_healthy_run_is_left_in_peace(name: str, curve: Callable[[int], curves.Curve]) -> None:
    assert not [seed for seed in SEEDS if errors_of(make_rule(name), curve(seed).values)]


@pytest.mark.parametrize("name", LEVEL_RULES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_lasting_jump_is_reported_after_its_onset_and_within_the_stated_delay(name: str, seed: int) -> None:
    curve = curves.jump(seed, height=4.0)
    assert curve.onset is not None
    found = errors_of(make_rule(name), curve.values)
    assert curve.onset <= found[0].step <= curve.onset + STATED_DELAY[name]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_value_that_is_not_finite_is_an_error_at_its_step(make: Callable[..., Rule], value: float) -> None:
    found = errors_of(make(), [3.0, 2.9, 2.8, value])
    assert [(finding.step, finding.kind) for finding in found] == [(3, "non_finite")]


@pytest.mark.parametrize("name", LEVEL_RULES)
@pytest.mark.parametrize("at", [20, 350], ids=["early", "late"])
def test_one_nan_does_not_blind_a_rule(name: str, at: int) -> None:
    curve = curves.jump(0, height=4.0)
    assert curve.onset is not None
    values = [*curve.values[:at], math.nan, *curve.values[at:]]
    kinds = {finding.kind: finding.step for finding in reversed(errors_of(make_rule(name), values))}
    assert kinds["non_finite"] == at
    assert curve.onset < kinds["jump"] <= curve.onset + 1 + STATED_DELAY[name]


@pytest.mark.parametrize("name", LEVEL_RULES)
def test_a_jump_after_a_constant_is_seen(name: str) -> None:
    curve = curves.constant_then_jump()
    assert curve.onset is not None
    found = errors_of(make_rule(name), curve.values)
    assert curve.onset <= found[0].step <= curve.onset + 10


@pytest.mark.parametrize("name", LEVEL_RULES)
def test_a_negative_loss_is_judged_like_any_other(name: str) -> None:
    values = [value - 10.0 for value in curves.jump(0, height=2.9).values]
    assert [f.step for f in errors_of(make_rule(name), values)][:1] == [
        f.step for f in errors_of(make_rule(name), curves.jump(0, height=2.9).values)
    ][:1]


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 120, 499, 503, 508, 560])
def test_a_rule_that_is_cut_and_resumed_finds_what_the_uncut_one_finds(
    make: Callable[..., Rule], cut: int
) -> None:
    values = [*curves.jump(3, height=4.0).values, math.nan, math.nan, 2.0]
    uncut = findings_of(make(), values)
    first, second = make(), make()
    before = findings_of(first, values[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert before + findings_of(second, values[cut:], first_step=cut) == uncut


def test_the_memory_is_strict_json_even_after_wild_values(make: Callable[..., Rule]) -> None:
    rule = make()
    findings_of(rule, [1e308, -1e308, math.nan, 5e-324, math.inf, 0.0, 1e308] * 10)
    state = rule.state_dict()
    assert json.loads(json.dumps(state, allow_nan=False)) == state


def test_the_memory_does_not_grow_with_the_run(make: Callable[..., Rule]) -> None:
    sizes = []
    for n in (3000, 6000):
        rule = make()
        findings_of(rule, curves.noisy(0, n).values)
        sizes.append(len(json.dumps(rule.state_dict())))
    assert sizes[1] < 1.05 * sizes[0] + 64


def test_a_reset_rule_is_like_a_new_one(make: Callable[..., Rule]) -> None:
    values = curves.jump(1, height=4.0).values
    rule = make()
    first = findings_of(rule, values)
    rule.reset()
    assert rule.state_dict() == make().state_dict()
    assert findings_of(rule, values) == first


@pytest.mark.parametrize("broken", [{}, {"unrelated": 1}], ids=["empty", "of something else"])
def test_a_memory_that_does_not_fit_is_refused_and_changes_nothing(
    make: Callable[..., Rule], broken: dict[str, Any]
) -> None:
    rule = make()
    findings_of(rule, curves.healthy(0, 100).values)
    before = json.dumps(rule.state_dict())
    with pytest.raises(ValueError, match=r"state|buffer"):
        rule.load_state_dict(broken)
    assert json.dumps(rule.state_dict()) == before


def test_each_part_of_the_memory_is_needed(make: Callable[..., Rule]) -> None:
    rule = make()
    findings_of(rule, curves.healthy(0, 100).values)
    for part in rule.state_dict():
        state = {key: value for key, value in rule.state_dict().items() if key != part}
        with pytest.raises(ValueError, match=part):
            make().load_state_dict(state)


def test_a_finding_can_be_read_by_people_and_by_programs(make: Callable[..., Rule]) -> None:
    values = [*curves.jump(0, height=4.0).values, math.nan]
    for finding in findings_of(make(metric_key="loss"), values):
        assert finding.onset_step <= finding.step
        assert finding.severity in SEVERITIES
        assert finding.message.startswith(f"`{finding.metric}`")
        assert f"step {finding.step}" in finding.message or finding.kind == "plateau"
        json.dumps(finding.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["ema", "window"])
@pytest.mark.parametrize("how", ["reset", "loaded"])
def test_what_was_pending_is_forgotten_with_the_rest(name: str, how: str) -> None:
    rule = make_rule(
        name, **({"short_window": 2, "long_window": 4} if name == "window" else {"threshold": 1.0})
    )
    fresh = rule.state_dict()
    findings_of(rule, [1.0] * 4 + [5.0] * 2)
    assert rule.pending_since is not None  # type: ignore[attr-defined]
    rule.reset() if how == "reset" else rule.load_state_dict(fresh)
    assert rule.pending_since is None  # type: ignore[attr-defined]
