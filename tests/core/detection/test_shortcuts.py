"""What the adaptive rule leaves out for speed changes neither its findings nor its memory."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_divguard.core.detection import gradients, level
from hf_divguard.core.detection.adaptive import AdaptiveRule
from hf_divguard.core.detection.sorted_window import SortedWindow
from tests import curves

Rows = list[tuple[int, float, float | None]]


def wild(seed: int, n: int = 1500) -> Rows:
    """A random series with spikes, jumps, NaN, zeros, ties, and gradient norms that explode now and then."""
    rng = random.Random(seed)
    here = rng.choice([0.0, 1.0, 5.0, -3.0, 1e-6, 1e6])
    spread = abs(here) * rng.choice([0.001, 0.02, 0.2, 1.0]) + rng.choice([0.0, 1e-9])
    drift = rng.choice([0.0, -0.001, -0.01, 0.0005]) * (abs(here) or 1.0)
    rows: Rows = []
    for i in range(n):
        here += drift * math.exp(-i / 300) + (rng.gauss(0.0, spread * 0.05) if rng.random() < 0.25 else 0.0)
        here += spread * rng.choice([5, 20]) if rng.random() < 0.0005 else 0.0
        value = here + rng.gauss(0.0, spread)
        event = rng.random()
        if event < 0.002:
            value += spread * rng.choice([3.0, 30.0, 300.0, 1e5])
        elif event < 0.004:
            value = rng.choice([math.nan, 0.0, 1e308])
        norm = abs(rng.gauss(1.0, 0.3)) * (1000.0 if rng.random() < 0.002 else 1.0)
        value = value if seed % 2 or not math.isfinite(value) else round(value, 2)
        rows.append((i + 1, value, None if seed % 4 == 0 else norm))
    return rows


def observed(rows: Rows, **params: Any) -> tuple[list[Any], dict[str, Any]]:
    rule = AdaptiveRule(**params)
    seen: list[Any] = []
    for step, value, norm in rows:
        found = rule.observe(step, value, norm)
        seen.append((found and found.to_dict(), rule.is_open, rule.pending_since))
    return seen, rule.state_dict()


def without_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level.LossLevelMonitor, "_is_calm", lambda self, value: False)
    monkeypatch.setattr(SortedWindow, "push_unsorted", SortedWindow.push)
    monkeypatch.setattr(
        gradients.Gradients,
        "is_large",
        lambda self, norm: self._seen >= 18 and norm >= 100.0 * self._baseline.quantile(0.5),
    )


def assert_equal(rows: Rows, monkeypatch: pytest.MonkeyPatch, **params: Any) -> None:
    fast = observed(rows, **params)
    with monkeypatch.context() as patch:
        without_shortcuts(patch)
        assert observed(rows, **params) == fast


@pytest.mark.parametrize("curve", [*curves.HEALTHY, *curves.FAILING], ids=lambda curve: curve.__name__)
def test_shortcuts_change_nothing_on_the_labelled_curves(
    curve: Callable[[int], curves.Curve], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = curve(0).values
    rng = random.Random(0)
    assert_equal([(i + 1, value, abs(rng.gauss(1.0, 0.3))) for i, value in enumerate(values)], monkeypatch)


@pytest.mark.parametrize("seed", range(8))
def test_shortcuts_change_nothing_on_random_series(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equal(wild(seed), monkeypatch, sensitivity=[1.0, 0.3, 4.0][seed % 3])


def test_the_shortcut_is_taken_for_most_values_of_a_healthy_run(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    original = level.LossLevelMonitor._is_calm

    def counted(self: level.LossLevelMonitor, value: float) -> bool:
        taken.append(original(self, value))
        return taken[-1]

    monkeypatch.setattr(level.LossLevelMonitor, "_is_calm", counted)
    observed([(i + 1, value, None) for i, value in enumerate(curves.healthy(0, 3000).values)])
    assert sum(taken) > 0.6 * len(taken)


@given(
    st.lists(st.tuples(st.integers(-5, 5).map(float), st.booleans(), st.booleans()), max_size=60),
    st.integers(1, 12),
)
@settings(deadline=None)
def test_a_window_is_in_order_however_it_was_filled(
    changes: list[tuple[float, bool, bool]], size: int
) -> None:
    window, plain = SortedWindow(), []
    for value, is_lazy, is_read in changes:
        (window.push_unsorted if is_lazy else window.push)(value, size)
        plain = [*plain, value][-size:]
        if is_read:
            assert window.ordered == sorted(plain)
    assert list(window) == plain
    assert window.ordered == sorted(plain)
