"""The command ``tune``: settings that stay silent on healthy runs and find the bad ones first."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from hf_divguard.cli.condition import first_lasting
from hf_divguard.cli.exits import NO, OK, USAGE, CommandError
from hf_divguard.cli.output import print_json, printable, table
from hf_divguard.cli.sources import find_sources, read_source
from hf_divguard.errors import HistoryError
from hf_divguard.history import History
from hf_divguard.replays import replay

__all__ = ["run_tune"]

_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
_ADAPTIVE = [{"sensitivity": value} for value in (0.5, 0.7, 1.0, 1.4, 2.0, 3.0)]
_EMA = [
    {"short_alpha": short, "long_alpha": long, "threshold": threshold}
    for (short, long), threshold in product(((0.1, 0.01), (0.3, 0.03)), _THRESHOLDS)
]
_WINDOW = [
    {"short_window": short, "long_window": long, "threshold": threshold}
    for (short, long), threshold in product(((10, 100), (5, 50)), _THRESHOLDS)
]
_GRIDS: dict[str, list[dict[str, Any]]] = {"adaptive": _ADAPTIVE, "ema": _EMA, "window": _WINDOW}


@dataclass(frozen=True)
class _Run:
    """A past run: whether it went wrong, from which step on, and who says so."""

    path: str
    history: History
    is_bad: bool
    onset: int | None
    said_by: str


@dataclass(frozen=True)
class _Score:
    """What one setting does on all runs."""

    detector: str
    settings: dict[str, Any]
    false: list[str]
    missed: list[str]
    delays: list[int]

    @property
    def rank(self) -> tuple[float, ...]:
        """The smaller, the better: false alarms, missed runs, delay; the usual settings first."""
        usual = self.detector == "adaptive" and self.settings == {"sensitivity": 1.0}
        return (len(self.false), len(self.missed), self.delay or 0.0, not usual, self.detector != "adaptive")

    @property
    def delay(self) -> float | None:
        """Mean number of steps from the onset to the finding."""
        return sum(self.delays) / len(self.delays) if self.delays else None


def run_tune(options: Any) -> int:
    """Try settings on past runs; print a table and the flags of the best."""
    if options.top < 1:
        raise CommandError(f"`--top` must be at least 1, got {options.top}.", USAGE)
    runs = _runs(options)
    if not runs:
        raise CommandError("Give at least one past run: a path, or `--healthy PATH` and `--bad PATH`.", USAGE)
    chosen = [options.detector] if options.detector else list(_GRIDS)
    tried = [(name, settings) for name in chosen for settings in _GRIDS[name]]
    scores = []
    for number, (name, settings) in enumerate(tried, start=1):
        _tell(f"setting {number} of {len(tried)}")
        scores.append(_score(name, settings, runs, options.metric))
    _tell("")
    scores.sort(key=lambda score: score.rank)
    if options.json:
        print_json("tune", _content(options, runs, scores))
    else:
        _print(runs, scores, options)
    return OK if not scores[0].false and not scores[0].missed else NO


def _tell(text: str) -> None:
    """Say how far it is, where somebody looks on."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


# ---- runs


def _runs(options: Any) -> list[_Run]:
    runs = []
    for label, paths in (("healthy", options.healthy), ("bad", options.bad), (None, options.paths)):
        for given in paths:
            path, onset = _onset_of(given) if label == "bad" else (given, None)
            runs += list(_labelled(path, label, onset, options.metric))
    return runs


def _onset_of(given: str) -> tuple[str, int | None]:
    """Return the path and the step of ``PATH@STEP``."""
    path, at, step = given.rpartition("@")
    return (path, int(step)) if at and step.isdecimal() else (given, None)


def _labelled(path: str, label: str | None, onset: int | None, metric: str) -> Iterator[_Run]:
    for place in find_sources(path):
        _tell(f"reading {printable(place)}")
        try:
            judged = [
                (each, replay(each.history, metric_key=metric).errors) for each in read_source(place, metric)
            ]
        except HistoryError as error:
            raise CommandError(str(error).replace("The history", f"`{place}`", 1)) from error
        for source, errors in judged:
            if not source.history.series(metric):
                raise CommandError(
                    f"`{source.path}` holds no `{metric}`, only evaluations. Name one with --metric."
                )
            lasting = first_lasting(source.history, errors, metric)
            found = None if lasting is None else lasting.onset_step
            is_bad = label == "bad" if label else found is not None
            start = onset if onset is not None else found
            yield _Run(
                source.path, source.history, is_bad, start if is_bad else None, "you" if label else "replay"
            )


# ---- settings


def _score(name: str, settings: dict[str, Any], runs: list[_Run], metric: str) -> _Score:
    false, missed, delays = [], [], []
    for run in runs:
        steps = [each.step for each in replay(run.history, name, metric_key=metric, **settings).errors]
        if not run.is_bad or (run.onset is not None and any(step < run.onset for step in steps)):
            false += [run.path] if steps else []
            continue
        if not steps:
            missed.append(run.path)
        elif run.onset is not None:
            delays.append(steps[0] - run.onset)
    return _Score(name, settings, false, missed, delays)


def _flags(score: _Score) -> str:
    return f"--divguard_detector {score.detector} --divguard_detector_kwargs {shlex.quote(json.dumps(score.settings))}"


def _content(options: Any, runs: list[_Run], scores: list[_Score]) -> dict[str, Any]:
    return {
        "metric": options.metric,
        "runs": [
            {
                "path": run.path,
                "label": "bad" if run.is_bad else "healthy",
                "onset_step": run.onset,
                "said_by": run.said_by,
            }
            for run in runs
        ],
        "settings": [
            {
                "detector": score.detector,
                "kwargs": score.settings,
                "false_alarms": score.false,
                "missed": score.missed,
                "mean_delay_steps": score.delay,
                "flags": _flags(score),
            }
            for score in scores[: options.top]
        ],
        "tried": len(scores),
    }


def _print(runs: list[_Run], scores: list[_Score], options: Any) -> None:
    rows = [
        [run.path, "bad" if run.is_bad else "healthy", "-" if run.onset is None else run.onset, run.said_by]
        for run in runs
    ]
    print(table(["run", "label", "onset", "said by"], rows, right="onset"))
    healthy, bad = [run for run in runs if not run.is_bad], [run for run in runs if run.is_bad]
    cells = [
        [
            score.detector,
            " ".join(f"{key}={value:g}" for key, value in score.settings.items()),
            f"{len(score.false)} of {len(runs)}",
            f"{len(bad) - len(score.missed) - len(set(score.false) & {run.path for run in bad})} of {len(bad)}",
            "-" if score.delay is None else f"{score.delay:.1f}",
        ]
        for score in scores[: options.top]
    ]
    print()
    print(table(["detector", "settings", "false alarms", "found", "delay in steps"], cells))
    print(f"\nThe first of {len(scores)} settings as flags:\n  {_flags(scores[0])}")
    if not healthy or not bad:
        missing = "healthy" if not healthy else "bad"
        print(f"There is no {missing} run among them: give one, with --{missing} if need be.")
    elif len(runs) < 6:
        print(f"{len(runs)} runs are few: what is best on them may not be best on the next one.")
    if scores[0].false or scores[0].missed:
        print("No setting is silent on all healthy runs and finds all bad ones. Are the labels right?")
