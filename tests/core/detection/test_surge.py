"""The size of a rise decides how many values are enough; what recovers, grows from zero or should rise is left alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from hf_divguard.core.detection.adaptive import AdaptiveRule
from hf_divguard.core.detection.level import LossLevelMonitor
from hf_divguard.core.findings import Finding
from tests import curves


def errors_of(
    values: list[float], *, every: int = 1, norms: list[float] | None = None, metric_key: str = "loss"
) -> list[Finding]:
    rule = AdaptiveRule(metric_key=metric_key)
    norms_or_none = norms or [None] * len(values)
    found = [rule.observe((i + 1) * every, value, norms_or_none[i]) for i, value in enumerate(values)]
    return [finding for finding in found if finding is not None and finding.severity == "error"]


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize(("size", "values"), [(1.2, 9), (10.0, 2), (100.0, 2), (10_000.0, 1)])
def test_the_larger_a_jump_the_fewer_values_are_needed_at_any_logging_interval(
    size: float, values: int, every: int
) -> None:
    before = curves.healthy(0, 300).values
    height = size * (max(before[:5]) - min(before))
    found = errors_of([*before, *(before[-1] + height for _ in range(20))], every=every)
    assert 1 <= found[0].step // every - 300 <= values


@pytest.mark.parametrize("norm", [None, 1e3], ids=["no gradient", "with gradient"])
@pytest.mark.parametrize("jump", [[1e5] * 3, [2.0, 1230.0, 1e10]], ids=["1e5", "growing"])
def test_a_jump_by_orders_of_magnitude_is_found_within_three_values(
    jump: list[float], norm: float | None
) -> None:
    rng = random.Random(0)
    healthy = [0.14 + rng.gauss(0.0, 0.005) for _ in range(80)]
    norms = None if norm is None else [1.0 + rng.gauss(0.0, 0.05) for _ in healthy] + [norm] * len(jump)
    assert errors_of(healthy + jump, every=100, norms=norms)


@pytest.mark.parametrize(
    "values",
    [
        [2.5, 1.9, 1.5, 1.3, 1.15, 1.05, 1.0, 1.02, 3.1, 3.3, 3.2, 3.4],
        [0.8, 0.5, 0.38, 0.33, 0.3, 0.5, 1.2, 2.5, 4.5, 7.0, 9.0],
        [2.5, 1.9, 1.5, 1.3, 1.15, 1.05, 1.0, 1.0, 1e5],
        [2.0, 1.6, 1.4, 1.3, 1.25, 1.2, 0.0, 0.0, 0.0, 0.0, 0.0],
    ],
    ids=["three times the level", "thirtyfold", "a single huge value", "zeros"],
)
def test_a_history_of_a_dozen_entries_is_read_as_a_person_reads_it(values: list[float]) -> None:
    assert errors_of(values, every=50)
    assert not errors_of(values[:6], every=50)


def test_early_progress_that_is_lost_for_good_is_found() -> None:
    rng = random.Random(0)
    learnt = [4.6 - 1.8 * (1.0 - math.exp(-t / 8)) + rng.gauss(0.0, 0.1) for t in range(25)]
    found = errors_of(learnt + [4.6 + rng.gauss(0.0, 0.05) for _ in range(60)])
    assert 26 <= found[0].step <= 40


def grpo(rng: random.Random, t: int) -> float:
    return (0.0 if rng.random() < 0.3 else rng.gauss(0.0, 0.03)) + 0.05 * (1.0 - math.exp(-t / 300))


def q_learning(rng: random.Random, t: int) -> float:
    return 1e-3 * (1.0 + t / 30) ** 1.3 * rng.lognormvariate(0.0, 0.9)


def margin(rng: random.Random, t: int) -> float:
    return max(0.0, math.exp(-t / 80) + rng.gauss(0.0, 0.12))


def single_rows(rng: random.Random, t: int) -> float:
    return (1.3 + 2.7 * math.exp(-t / 200)) * rng.lognormvariate(-0.3, 0.8)


def bad_batches(rng: random.Random, t: int) -> float:
    return 2.0 + 3.0 * math.exp(-t / 80) + rng.gauss(0.0, 0.1) + (500.0 if t in (200, 330) else 0.0)


def plateau_first(rng: random.Random, t: int) -> float:
    return 4.6 + rng.gauss(0.0, 0.02) - (2.5 * (1.0 - math.exp(-(t - 300) / 50)) if t > 300 else 0.0)


def epochs_over_few_rows(rng: random.Random, t: int) -> float:
    return max(
        0.01, 3.0 * 0.45 ** (t // 100) * (1.0 + 0.0012 * (t % 100)) + rng.gauss(0.0, 0.05 * 0.5 ** (t // 100))
    )


HARD = [grpo, q_learning, margin, single_rows, bad_batches, plateau_first, epochs_over_few_rows]


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("curve", HARD, ids=lambda curve: curve.__name__)
def test_healthy_losses_of_other_kinds_are_left_alone(
    curve: Callable[[random.Random, int], float], every: int
) -> None:
    stopped = 0
    for seed in range(10):
        rng = random.Random(seed)
        stopped += bool(errors_of(curves.every([curve(rng, t) for t in range(800)], every), every=every))
    assert stopped <= 1


@pytest.mark.parametrize(
    ("first", "then", "kinds"), [(0.5, 0.9, []), (0.9, 0.5, ["drop"])], ids=["rises", "falls"]
)
def test_an_accuracy_may_rise_and_must_not_fall(first: float, then: float, kinds: list[str]) -> None:
    values = [(first if t < 45 else then) + 0.01 * (t % 3) for t in range(90)]
    found = errors_of(values, metric_key="eval_accuracy")
    assert [finding.kind for finding in found] == kinds
    if found:
        assert found[0].value < 0.6
        assert "has stayed down since it dropped at step 46" in found[0].message


def test_an_unknown_direction_is_asked_for_and_judged_by_finite_values_only() -> None:
    with pytest.warns(UserWarning, match=r"direction of `eval_zork` must be known.*Set `greater_is_better`"):
        rule = AdaptiveRule(metric_key="eval_zork")
    values = [0.5] * 40 + [0.9] * 40 + [0.1] * 40
    assert not any(rule.observe(step, value) for step, value in enumerate(values))
    assert rule.observe(200, math.nan) is not None
    assert AdaptiveRule(metric_key="eval_zork", greater_is_better=True).observe(1, 0.5) is None


def test_what_recovered_raises_the_bar_for_a_while_and_not_for_ever() -> None:
    monitor = LossLevelMonitor()
    curve = curves.healthy(0, 4000).values
    for t in range(300, 330):
        curve[t] += 2.0 * math.exp(-(t - 300) / 8)
    steps = {}
    for after in (340, 3000):
        monitor.reset()
        values = [*curve[:after], *(value + 1.5 for value in curve[after : after + 900])]
        found = [monitor.observe(step, value, None) for step, value in enumerate(values)]
        steps[after] = next(f.step - after for f in found if f is not None and f.severity == "error")
    assert steps[3000] <= 20 < steps[340]
