"""Move every constant of the adaptive rule by a quarter, and stretch, shift and thin the runs: what changes?

    python -m benchmarks.detection.robustness             # 2 minutes: constants at every 10 steps
    python -m benchmarks.detection.robustness --complete  # 15 minutes: at every step and on the public runs, too

Writes ``robustness.md``: one row per constant and direction; then one row per way of changing the runs.
"""

from __future__ import annotations

import argparse
import math
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from benchmarks.detection.evaluate import cell, errors_of
from benchmarks.detection.runs import CORPUS, Run, read_runs, score
from hf_divguard.core import detection
from hf_divguard.core.detection import baseline

NOT_OF_THE_RULE = ("ema", "window", "eval_rise", "collapse")
"""Modules that no loss of the adaptive rule passes: other rules, and the warning on evaluations."""

NO_CHOICE = (
    "_MEDIAN_DIFFERENCE",
    "_MEDIAN_ERROR",
    "_NORMAL_EDGE",
    "_EDGE_DIFFERENCE",
    "HUGE",
    "_FEW_CHANGES",
    "_MIDDLE",
    "_HIGH",
    "_LOW",
)
"""Numbers from mathematics, of the format of numbers, for speed alone, and places worked out from other constants."""

MODULES = tuple(
    import_module(f"{detection.__name__}.{found.name}")
    for found in pkgutil.iter_modules(detection.__path__)
    if found.name not in NOT_OF_THE_RULE
)
INTRO = (
    "# The adaptive rule with each constant moved by a quarter, and on changed runs\n\n"
    "Written by `python -m benchmarks.detection.robustness`; "
    "[detectors.md](../detectors.md) describes the constants.\n\n"
)
COLUMNS = ("every 10: false", "recall", "delay")
MORE_COLUMNS = ("every step: false", "recall", "delay", "public: false", "recall", "delay")


def constants() -> dict[str, float]:
    """Return every number of the rule that is a choice, by name.

    Raises:
        ValueError: If two modules give the same name to two numbers.
    """
    found: dict[str, float] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            is_choice = name.isupper() and name not in NO_CHOICE and isinstance(value, (int, float))
            if is_choice and found.setdefault(name, value) != value:
                raise ValueError(f"Two constants of the rule are called {name}: rename one of them.")
    return found


@contextmanager
def moved(name: str, factor: float) -> Iterator[float]:
    """Multiply one constant for a while; whole numbers stay whole, shares stay below 1."""
    holders: list[ModuleType] = [module for module in MODULES if hasattr(module, name)]
    before = getattr(holders[0], name)
    after = before * factor
    if isinstance(before, int):
        after = max(1, math.floor(after) if factor < 1.0 else math.ceil(after))
    elif 0.5 < before < 1.0:
        # A share: its distance from 1 is what is moved.
        after = 1.0 - (1.0 - before) * factor
    try:
        _set(holders, name, after)
        yield after
    finally:
        _set(holders, name, before)


def _set(holders: list[ModuleType], name: str, value: float) -> None:
    for module in holders:
        setattr(module, name, value)
    # Worked out from two of them.
    baseline._MIDDLE, baseline._HIGH, baseline._LOW = baseline._places(baseline.LONGEST_WINDOW)


def head(*, is_complete: bool) -> str:
    """Return the head of a table."""
    columns = ("what", *COLUMNS, *(MORE_COLUMNS if is_complete else ()))
    return "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n"


def row(what: str, generated: list[Run], public: list[Run], *, is_complete: bool) -> str:
    """Return how the rule does as it is now, as a row of a table."""
    settings = [(generated, 10), *([(generated, 1), (public, 1)] if is_complete else [])]
    scores = [score(errors_of("adaptive"), runs, every) for runs, every in settings]
    numbers = [number for s in scores for number in (cell(s.false), cell(s.recall), cell(s.delay, 1))]
    return f"| {what} | " + " | ".join(numbers) + " |\n"


def changed(run: Run, scale: float, shift: float) -> Run:
    """The same run in other units; an exact 0.0 stays one, since it stands for a masked value."""
    return replace(run, loss=[value if value == 0.0 else scale * value + shift for value in run.loss])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--out", type=Path, default=Path("docs/detection"))
    parser.add_argument(
        "--complete", action="store_true", help="constants at every step and on public runs, too"
    )
    arguments = parser.parse_args(argv)
    runs = read_runs(arguments.corpus)
    generated = [run for run in runs if run.is_generated]
    public = [run for run in runs if not run.is_generated]

    complete = arguments.complete
    text = INTRO + head(is_complete=complete) + row("**as it is**", generated, public, is_complete=complete)
    for name, before in constants().items():
        for factor in (0.75, 1.25):
            with moved(name, factor) as after:
                text += row(f"`{name}` {before:g} → {after:g}", generated, public, is_complete=complete)
                print(text.splitlines()[-1], flush=True)
    text += "\n" + head(is_complete=True)
    for scale, shift in ((1.0, 0.0), (8.0, 0.0), (1e-3, 0.0), (1.0, 100.0), (0.37, -7.3)):
        text += row(
            f"loss x {scale:g} {shift:+g}",
            [changed(run, scale, shift) for run in generated],
            [changed(run, scale, shift) for run in public],
            is_complete=True,
        )
    text += "\n| logged every | false | recall | premature | delay |\n|---|---|---|---|---|\n"
    for every in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50):
        s = score(errors_of("adaptive"), generated, every)
        text += (
            f"| {every} | {cell(s.false)} | {cell(s.recall)} | {cell(s.premature)} | {cell(s.delay, 1)} |\n"
        )
    (arguments.out / "robustness.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
