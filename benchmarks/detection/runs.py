"""The labelled runs, and how a rule is scored on them."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

CORPUS = Path(__file__).parent / "corpus" / "dev.jsonl.gz"
FAILING = ("diverged", "nan", "collapsed_to_zero")
SILENT = ("healthy", "healthy_shift", "spike_recovered")


def is_judging(family: str, families: Sequence[str]) -> bool:
    """Return whether a family is in the judging half: every second one by name."""
    return sorted(set(families)).index(family) % 2 == 1


@dataclass(frozen=True)
class Run:
    """One labelled training run."""

    name: str
    family: str
    label: str
    is_generated: bool
    onset_step: int | None
    earliest_ok_step: int | None
    steps: list[int]
    loss: list[float]
    grad_norm: list[float | None]
    evaluations: dict[int, float]


class Alarm(Protocol):
    """A rule as the bench drives it."""

    def __call__(self, step: int, loss: float, grad_norm: float | None) -> bool: ...


@dataclass(frozen=True)
class Score:
    """What a rule did on a set of runs; rates are means over families of means over their runs."""

    false: float
    recall: float
    premature: float
    delay: float
    delay_90: float
    false_by_family: dict[str, float]
    recall_by_family: dict[str, float]
    delay_by_family: dict[str, float]


def read_runs(path: Path = CORPUS) -> list[Run]:
    runs = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            raw = json.loads(line)
            loss = [float(value) for value in raw["loss"]]
            norms = raw["grad_norm"] or [None] * len(loss)
            runs.append(
                Run(
                    name=raw["id"],
                    family=raw["family"],
                    label=raw["label"],
                    is_generated=raw["origin"] == "generated",
                    onset_step=raw["onset_step"],
                    earliest_ok_step=raw["earliest_ok_step"],
                    steps=raw["steps"],
                    loss=loss,
                    grad_norm=[None if norm is None else float(norm) for norm in norms],
                    evaluations={
                        entry["step"]: float(entry["eval_loss"])
                        for entry in raw["eval"] or []
                        if entry["eval_loss"] is not None
                    },
                )
            )
    return runs


def observations(run: Run, every: int = 1) -> Iterable[tuple[int, float, float | None]]:
    """The run as a Trainer with ``logging_steps=every`` logs it: mean losses, the last gradient norm."""
    for start in range(0, len(run.loss) - every + 1, every):
        last = start + every - 1
        loss = run.loss[start : start + every]
        # sum, not fsum: an overflow is to be seen as infinity.
        yield run.steps[last], sum(loss) / every, run.grad_norm[last]


def first_alarm(rule: Alarm, run: Run, every: int = 1) -> tuple[int, int] | None:
    """Return the step of the first alarm, and the number of observations after the onset up to it."""
    after_onset = 0
    for step, loss, norm in observations(run, every):
        after_onset += run.onset_step is not None and step > run.onset_step
        if rule(step, loss, norm):
            return step, after_onset
    return None


def score(make_rule: Callable[[], Alarm], runs: Sequence[Run], every: int = 1) -> Score:
    false, found, early, delays = (defaultdict(list) for _ in range(4))
    for run in runs:
        if run.label in SILENT:
            false[run.family].append(first_alarm(make_rule(), run, every) is not None)
        elif run.label in FAILING:
            assert run.earliest_ok_step is not None
            alarm = first_alarm(make_rule(), run, every)
            in_time = alarm is not None and alarm[0] >= run.earliest_ok_step
            found[run.family].append(in_time)
            early[run.family].append(alarm is not None and not in_time)
            if alarm is not None and in_time:
                delays[run.family].append(alarm[1])
    everywhere = sorted(delay for family in delays.values() for delay in family)
    return Score(
        false=_mean_of_means(false),
        recall=_mean_of_means(found),
        premature=_mean_of_means(early),
        delay=statistics.median(everywhere) if everywhere else math.nan,
        delay_90=everywhere[math.ceil(0.9 * len(everywhere)) - 1] if everywhere else math.nan,
        false_by_family={family: statistics.fmean(values) for family, values in sorted(false.items())},
        recall_by_family={family: statistics.fmean(values) for family, values in sorted(found.items())},
        delay_by_family={family: statistics.median(values) for family, values in sorted(delays.items())},
    )


def _mean_of_means(groups: dict[str, list[bool]]) -> float:
    return statistics.fmean(statistics.fmean(values) for values in groups.values()) if groups else math.nan
