"""Measure how long one update of each rule takes.

    python -m benchmarks.detection.update_cost

Prints a markdown table: microseconds per ``observe`` on a healthy noisy loss, while a jump
is being judged (the most work the adaptive rule has), and of the slowest single update. Each
number is the processor time in the best of five rounds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

from hf_divguard.core.detection.registry import make_rule

CASES = {
    "ema": ("ema", {}),
    "window (10, 100)": ("window", {}),
    "window (100, 1000)": ("window", {"short_window": 100, "long_window": 1000}),
    "window (1000, 10000)": ("window", {"short_window": 1000, "long_window": 10000}),
    "nonfinite": ("nonfinite", {}),
    "adaptive": ("adaptive", {}),
    "adaptive, loss only": ("adaptive", {}),
}


def feeder(name: str, params: dict[str, int], with_norm: bool) -> Callable[[int, float, float], object]:
    rule = make_rule(name, **params)
    if with_norm:
        observe = rule.observe
        return lambda step, loss, norm: observe(step, loss, norm)  # type: ignore[call-arg]
    return lambda step, loss, norm: rule.observe(step, loss)


def series(n: int, jump_at: int) -> list[tuple[int, float, float]]:
    """A falling noisy loss; after ``jump_at`` it is high and comes down so slowly that the rule keeps looking."""
    rng = random.Random(0)
    rows = []
    for t in range(n):
        loss = 2.0 + 3.0 * 0.99**t + rng.gauss(0.0, 0.1)
        norm = 1.0 + 0.2 * rng.random()
        if t >= jump_at:
            loss += 6.0 * 0.99 ** (t - jump_at)
            norm *= 4.0
        rows.append((t, loss, norm))
    return rows


def measure(case: str, n: int, jump_at: int) -> tuple[float, float]:
    """Return microseconds per update, and of the slowest one in a thousand, after the first thousand."""
    name, params = CASES[case]
    with_norm = name in ("adaptive", "nonfinite") and "loss only" not in case
    rows = series(n, jump_at)
    warm = min(1000, jump_at)
    means, slow = [], []
    for _ in range(5):
        feed = feeder(name, params, with_norm)
        for entry in rows[:warm]:
            feed(*entry)
        started = time.process_time()
        for entry in rows[warm:]:
            feed(*entry)
        means.append((time.process_time() - started) / (n - warm))
        feed = feeder(name, params, with_norm)
        times = []
        for entry in rows:
            before = time.process_time()
            feed(*entry)
            times.append(time.process_time() - before)
        slow.append(sorted(times)[int(0.999 * n)])
    return 1e6 * min(means), 1e6 * min(slow)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args(argv)
    text = "| rule | healthy, µs | in a jump, µs | slowest of a thousand, µs |\n|---|---|---|---|\n"
    for case in CASES:
        healthy, _ = measure(case, 20_000, 20_000)
        jumping, slowest = measure(case, 1_300, 1_000)
        text += f"| {case} | {healthy:.2f} | {jumping:.2f} | {slowest:.1f} |\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
