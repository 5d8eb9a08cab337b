"""The command ``compare``: runs side by side."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

from hf_divguard.cli.condition import condition_of
from hf_divguard.cli.exits import CANNOT_ANSWER, OK, CommandError
from hf_divguard.cli.folders import run_folder, runs_below
from hf_divguard.cli.keeping import survey
from hf_divguard.cli.output import number_in_words, print_json, printable, table
from hf_divguard.cli.sources import read_source
from hf_divguard.cli.sparkline import sparkline
from hf_divguard.errors import HistoryError

__all__ = ["losses_of", "run_compare", "speaks_unicode"]


def run_compare(options: Any) -> int:
    """Compare runs: their losses, findings and best checkpoints."""
    results, curves = [], []
    for path in [each for given in options.dirs for each in _runs(given)]:
        try:
            result, losses = _looked_at(path, options)
        except CommandError as error:
            result, losses = {"path": path, "error": str(error)}, []
        results.append(result)
        curves.append(losses)
    if all("error" in each for each in results):
        raise CommandError(f"None of the {len(results)} runs can be read. {results[0]['error']}")
    if options.json:
        print_json("compare", {"metric": options.metric, "runs": results})
    else:
        _print(results, curves)
    return CANNOT_ANSWER if any("error" in each for each in results) else OK


def _runs(path: str) -> list[str]:
    """Return the run at ``path``, or the runs below it."""
    try:
        return [run_folder(path)]
    except CommandError:
        below = runs_below(path) if os.path.isdir(path) else []
        if not below:
            raise
        return below


def losses_of(folder: str) -> list[tuple[int, float]]:
    """Return steps and losses of a run in the order of the steps; none if it has no log."""
    try:
        [source] = read_source(folder, "loss")
    except (CommandError, HistoryError):
        return []
    return sorted(
        ((each.step, each.values["loss"]) for each in source.history.series("loss")),
        key=lambda point: point[0],
    )


def _looked_at(path: str, options: Any) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    seen = survey(run_folder(path), options.metric, options.greater)
    condition = condition_of(seen)
    losses = losses_of(path)
    finite = [point for point in losses if math.isfinite(point[1])]
    lowest = min(finite, key=lambda point: point[1], default=None)
    best, fault = seen.best[0] if seen.best else None, condition.divergence
    return {
        "path": path,
        "state": condition.state,
        "step": condition.step,
        "max_steps": condition.progress.max_steps,
        "last_loss": losses[-1][1] if losses else None,
        "lowest_loss": None if lowest is None else lowest[1],
        "lowest_loss_step": None if lowest is None else lowest[0],
        "finding": None if fault is None else fault.kind,
        "finding_step": None if fault is None else fault.step,
        "onset_step": None if fault is None else fault.onset_step,
        "rollbacks": condition.record.rollbacks,
        "metric": seen.metric_key,
        "best_metric": None if best is None else best.metric,
        "best_step": None if best is None else best.step,
        "best_checkpoint": None if best is None else best.path,
        "checkpoints": len(seen.found),
    }, losses


def speaks_unicode() -> bool:
    """Return whether standard output can show bars of a curve."""
    return (sys.stdout.encoding or "ascii").lower().startswith("utf")


def _row(result: dict[str, Any], curve: str) -> list[Any]:
    """Return the cells of one run."""
    if "error" in result:
        return [result["path"], "cannot be read", *["-"] * 6]
    best = (
        f"{number_in_words(result['best_metric'])} at {result['best_step']}"
        if result["best_checkpoint"]
        else "-"
    )
    return [
        result["path"],
        result["state"],
        "-" if result["step"] is None else result["step"],
        number_in_words(result["last_loss"]),
        number_in_words(result["lowest_loss"]),
        best,
        f"{result['finding']} at {result['finding_step']}" if result["finding"] else "-",
        curve or "-",
    ]


def _print(results: list[dict[str, Any]], curves: list[list[tuple[int, float]]]) -> None:
    finite = [value for losses in curves for _, value in losses if math.isfinite(value)]
    limits = (min(finite), max(finite)) if finite else None
    cells = []
    for each, losses in zip(results, curves, strict=True):
        curve = sparkline([loss for _, loss in losses], 24, limits=limits, ascii_only=not speaks_unicode())
        cells.append(_row(each, curve))
    metrics = sorted({each["metric"] for each in results if each.get("best_checkpoint")})
    head = [
        "run",
        "state",
        "step",
        "loss",
        "lowest",
        f"best {', '.join(metrics)}".strip(),
        "finding",
        "loss curve",
    ]
    print(table(head, cells, right="step loss lowest"))
    for each in results:
        if "error" in each:
            print(f"{printable(each['path'])}: {printable(each['error'])}")
