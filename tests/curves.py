"""Made training curves whose true onset is known: numbers from formulas, none from a run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """A made loss curve; ``onset`` is the index of the first bad value, ``None`` for a healthy one."""

    name: str
    values: list[float]
    onset: int | None = None


def falling(n: int, start: float = 5.0, floor: float = 2.0, rate: float = 0.01) -> list[float]:
    return [floor + (start - floor) * math.exp(-rate * t) for t in range(n)]


def _noisy(base: list[float], spread: float, rng: random.Random) -> list[float]:
    return [level + rng.gauss(0.0, spread) for level in base]


def healthy(seed: int, n: int = 800) -> Curve:
    rng = random.Random(seed)
    return Curve("healthy", _noisy(falling(n), 0.1, rng))


def noisy(seed: int, n: int = 800) -> Curve:
    rng = random.Random(seed)
    return Curve("noisy", _noisy(falling(n), 0.6, rng))


def flat(seed: int, n: int = 800) -> Curve:
    rng = random.Random(seed)
    return Curve("flat", [2.0 + rng.gauss(0.0, 0.3) for _ in range(n)])


def heavy_tailed(seed: int, n: int = 800) -> Curve:
    rng = random.Random(seed)
    return Curve("heavy-tailed", [level + 0.2 * rng.paretovariate(1.5) for level in falling(n)])


def near_zero(seed: int, n: int = 1200) -> Curve:
    rng = random.Random(seed)
    return Curve("near zero", [level * rng.lognormvariate(0.0, 1.2) for level in falling(n, 2.3, 0.01, 0.02)])


def negative(seed: int, n: int = 800) -> Curve:
    rng = random.Random(seed)
    return Curve("negative", _noisy(falling(n, 0.0, -2.0), 0.1, rng))


def wandering(seed: int, n: int = 1500, memory: float = 0.95) -> Curve:
    """A policy loss: no trend, neighbours alike, sign of no meaning."""
    rng = random.Random(seed)
    values, drift = [], 0.0
    for _ in range(n):
        drift = memory * drift + rng.gauss(0.0, 0.1)
        values.append(drift + rng.gauss(0.0, 0.3))
    return Curve("wandering", values)


def rising_game(seed: int, n: int = 1500) -> Curve:
    """A generator's loss: it goes up for good while the game goes well."""
    rng = random.Random(seed)
    values, drift = [], 0.0
    for t in range(n):
        drift = 0.98 * drift + rng.gauss(0.0, 0.05)
        values.append(0.7 + 1.6 * (1.0 - math.exp(-t / 300)) + drift + rng.gauss(0.0, 0.25))
    return Curve("rising game", values)


def alternating(seed: int, n: int = 1200, block: int = 10, step_up: float = 1.0) -> Curve:
    """Two data sets in turn, one of them harder by a constant."""
    rng = random.Random(seed)
    base = falling(n)
    return Curve(
        f"alternating {block}",
        [base[t] + (step_up if (t // block) % 2 else 0.0) + rng.gauss(0.0, 0.15) for t in range(n)],
    )


def mixed(seed: int, n: int = 1000) -> Curve:
    rng = random.Random(seed)
    return Curve(
        "mixed", [level + (1.5 if rng.random() < 0.3 else 0.0) + rng.gauss(0.0, 0.15) for level in falling(n)]
    )


def warm_restarts(seed: int, n: int = 1200, cycle: int = 300) -> Curve:
    """The rate goes back up at the start of each cycle: a hump that decays."""
    rng = random.Random(seed)
    base = falling(n)
    values = []
    for t in range(n):
        since = t % cycle if t >= cycle else n
        values.append(base[t] + 0.8 * math.exp(-since / 30) + rng.gauss(0.0, 0.12))
    return Curve("warm restarts", values)


def wave(seed: int, n: int = 800, period: int = 60) -> Curve:
    rng = random.Random(seed)
    base = falling(n)
    return Curve(
        "wave", [base[t] + 0.3 * math.sin(2 * math.pi * t / period) + rng.gauss(0.0, 0.1) for t in range(n)]
    )


def sawtooth(seed: int, n: int = 1000, epoch: int = 125) -> Curve:
    """Unshuffled epochs: the loss rises a little within each and drops after it."""
    rng = random.Random(seed)
    base = falling(n, rate=0.004)
    return Curve("sawtooth", [base[t] + 0.4 * (t % epoch) / epoch + rng.gauss(0.0, 0.1) for t in range(n)])


def stairs(seed: int, n: int = 1000, epoch: int = 200) -> Curve:
    rng = random.Random(seed)
    return Curve("stairs", [2.0 + 3.0 * 0.6 ** (t // epoch) + rng.gauss(0.0, 0.12) for t in range(n)])


def noise_grows(seed: int, n: int = 1000) -> Curve:
    rng = random.Random(seed)
    base = falling(n)
    return Curve("noise grows", [base[t] + rng.gauss(0.0, 0.1 if t < n // 2 else 0.5) for t in range(n)])


def spike(seed: int, n: int = 800, at: int = 500, length: int = 3, height: float = 6.0) -> Curve:
    rng = random.Random(seed)
    values = _noisy(falling(n), 0.1, rng)
    for t in range(at, at + length):
        values[t] += height
    return Curve("spike", values)


def healing_step(seed: int, n: int = 1000, at: int = 500) -> Curve:
    """Harder data: the loss steps up and is learnt down again."""
    rng = random.Random(seed)
    values = _noisy(falling(n), 0.1, rng)
    for t in range(at, n):
        values[t] += 2.0 * math.exp(-(t - at) / 25)
    return Curve("healing step", values)


def late_bump(seed: int, n: int = 1200) -> Curve:
    """A slow hump of a fifth of what was learnt, gone again in the end."""
    rng = random.Random(seed)
    base = falling(n)
    return Curve(
        "late bump",
        [base[t] + 0.6 * math.exp(-(((t - 700) / 120) ** 2)) + rng.gauss(0.0, 0.12) for t in range(n)],
    )


HEALTHY: list[Callable[[int], Curve]] = [
    healthy,
    noisy,
    flat,
    heavy_tailed,
    near_zero,
    negative,
    wandering,
    rising_game,
    alternating,
    mixed,
    warm_restarts,
    wave,
    sawtooth,
    stairs,
    noise_grows,
    spike,
    healing_step,
    late_bump,
]
"""Curves on which nothing may be stopped."""


def jump(seed: int, n: int = 800, at: int = 500, height: float = 2.0) -> Curve:
    rng = random.Random(seed)
    values = _noisy(falling(n), 0.1, rng)
    return Curve(f"jump {height}", values[:at] + [v + height for v in values[at:]], at)


def overshoot(seed: int, n: int = 800, at: int = 500) -> Curve:
    """Up above the beginning, half way down again, and stuck there."""
    rng = random.Random(seed)
    values = _noisy(falling(n), 0.1, rng)
    for t in range(at, n):
        values[t] += 1.5 + 6.0 * math.exp(-(t - at) / 8)
    return Curve("overshoot", values, at)


def climb(seed: int, n: int = 1500, at: int = 600, per_step: float = 0.004) -> Curve:
    rng = random.Random(seed)
    values = _noisy(falling(n), 0.1, rng)
    return Curve("climb", [v + per_step * max(0, t - at) for t, v in enumerate(values)], at)


def runaway(seed: int, n: int = 900, at: int = 500) -> Curve:
    rng = random.Random(seed)
    values = _noisy(falling(n), 0.1, rng)
    return Curve("runaway", [v + 0.02 * (1.05 ** max(0, t - at) - 1.0) for t, v in enumerate(values)], at)


def flat_jump(seed: int, n: int = 600, at: int = 300) -> Curve:
    rng = random.Random(seed)
    return Curve("flat jump", [(2.0 if t < at else 4.5) + rng.gauss(0.0, 0.3) for t in range(n)], at)


def heavy_jump(seed: int, n: int = 900, at: int = 500) -> Curve:
    values = heavy_tailed(seed, n).values
    return Curve("heavy-tailed jump", values[:at] + [v + 2.0 for v in values[at:]], at)


def negative_jump(seed: int, n: int = 800, at: int = 500) -> Curve:
    values = negative(seed, n).values
    return Curve("negative jump", values[:at] + [v + 1.5 for v in values[at:]], at)


def nan_burst(seed: int, n: int = 600, at: int = 400) -> Curve:
    values = healthy(seed, n).values
    return Curve("nan burst", values[:at] + [math.nan] * (n - at), at)


def constant_then_jump(_seed: int = 0, n: int = 300, at: int = 200) -> Curve:
    return Curve("constant then jump", [2.0] * at + [8.0] * (n - at), at)


FAILING: list[Callable[[int], Curve]] = [
    jump,
    overshoot,
    climb,
    runaway,
    flat_jump,
    heavy_jump,
    negative_jump,
    nan_burst,
    constant_then_jump,
]
"""Curves that go wrong at ``onset`` and do not come back."""


def every(values: list[float], k: int) -> list[float]:
    """The means of each ``k`` values, as a Trainer with ``logging_steps=k`` logs them."""
    return [math.fsum(values[i : i + k]) / k for i in range(0, len(values) - k + 1, k)]
