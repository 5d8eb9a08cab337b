"""Move every constant of the adaptive rule by a quarter, and stretch, shift and thin the runs: what changes?

    python -m benchmarks.detection.robustness          # 8 minutes

Writes ``robustness.md``: one row per constant and direction with the scores at every step, at
every 10 steps and on the public runs; then one row per way of changing the runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from benchmarks.detection.evaluate import cell, errors_of
from benchmarks.detection.runs import CORPUS, Run, read_runs, score
from hf_divguard.core.detection import baseline, cusum, level, surge

MODULES = (baseline, cusum, level, surge)
INTRO = (
    "# The adaptive rule with each constant moved by a quarter, and on changed runs\n\n"
    "Written by `python -m benchmarks.detection.robustness`; "
    "[detectors.md](../detectors.md) describes the constants.\n\n"
)
HEAD = (
    "| what | every step: false | recall | delay | every 10: false | recall | public: false | recall |\n"
    + "|---" * 8
    + "|\n"
)


def constants() -> dict[str, float]:
    """Return every number of the rule that is a choice, by name: upper-case and public."""
    return {
        name: value
        for module in MODULES
        for name, value in vars(module).items()
        if name.isupper() and not name.startswith("_") and isinstance(value, (int, float))
    }


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
        for module in holders:
            setattr(module, name, after)
        yield after
    finally:
        for module in holders:
            setattr(module, name, before)


def row(what: str, generated: list[Run], public: list[Run]) -> str:
    step, ten, pub = (
        score(errors_of("adaptive"), generated, 1),
        score(errors_of("adaptive"), generated, 10),
        score(errors_of("adaptive"), public, 1),
    )
    numbers = [
        cell(step.false),
        cell(step.recall),
        cell(step.delay, 1),
        cell(ten.false),
        cell(ten.recall),
        cell(pub.false),
        cell(pub.recall),
    ]
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
    arguments = parser.parse_args(argv)
    runs = read_runs(arguments.corpus)
    generated = [run for run in runs if run.is_generated]
    public = [run for run in runs if not run.is_generated]

    text = INTRO + HEAD + row("**as it is**", generated, public)
    for name, before in constants().items():
        for factor in (0.75, 1.25):
            with moved(name, factor) as after:
                text += row(f"`{name}` {before:g} → {after:g}", generated, public)
                print(text.splitlines()[-1], flush=True)
    text += "\n" + HEAD
    for scale, shift in ((1.0, 0.0), (8.0, 0.0), (1e-3, 0.0), (1.0, 100.0), (0.37, -7.3)):
        text += row(
            f"loss x {scale:g} {shift:+g}",
            [changed(run, scale, shift) for run in generated],
            [changed(run, scale, shift) for run in public],
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
