"""Runs what is missing, and compares the guarded runs of each cell with the stock run and with the oracle."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.recovery.cache import Cache, key_of
from benchmarks.recovery.cells import STEPS, Cell
from benchmarks.recovery.runs import GUARDED, run

Job = tuple[str, Cell, str, dict[str, Any]]
Row = dict[str, Any]

WORSE = 1.01
"""A guarded run whose loss is above this times the unguarded one's was harmed by the guard."""

NO_ACTION = ("data", "dismissed", "warned")
"""Events without an action: the run goes on as it was."""


def variants_of(cell: Cell, guarded: tuple[str, ...] = GUARDED) -> tuple[str, ...]:
    """Return the variants of a cell: only faults have updates that an oracle can leave out."""
    return ("stock", *(("oracle",) if cell.group == "fault" else ()), *guarded)


def missing(
    cells: list[Cell], guarded: tuple[str, ...], options: dict[str, Any], cache: Cache, again: bool
) -> list[Job]:
    """Return the runs that the cache lacks, each once; with ``again`` the guarded ones whether it has them or not."""
    jobs: dict[str, Job] = {}
    for cell in cells:
        for variant in variants_of(cell, guarded):
            key = key_of(cell, variant, options)
            if key not in cache or (again and variant in GUARDED):
                jobs.setdefault(key, (key, cell, variant, options))
    return list(jobs.values())


def _do(job: Job) -> tuple[Job, dict[str, Any]]:
    _, cell, variant, options = job
    return job, run(cell, variant, options if variant in GUARDED else None)


def _done(jobs: list[Job], processes: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    if processes <= 1:
        yield from map(_do, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(_do, jobs)


def fill(jobs: list[Job], cache: Cache, processes: int) -> None:
    """Make the runs, keep each outcome at once, and print a line for each."""
    began = time.perf_counter()
    for place, ((key, cell, variant, _), outcome) in enumerate(_done(jobs, processes), start=1):
        cache.add(key, outcome)
        left = (time.perf_counter() - began) / place * (len(jobs) - place)
        note = outcome.get("error") or (outcome.get("gave_up") and "gave up") or ""
        print(
            f"[{place}/{len(jobs)}, {left / 60:.0f} min left] {cell.name} {variant}: "
            f"loss {outcome['final']:.4f} after {outcome['last_step']} steps, {outcome['seconds']:.1f} s {note}",
            flush=True,
        )


# ---- one cell


def compare(cell: Cell, options: dict[str, Any], cache: Cache, guarded: tuple[str, ...] = GUARDED) -> Row:
    """Return how the guarded runs of a cell ended, beside the stock run and the oracle."""
    ran = {variant: cache[key_of(cell, variant, options)] for variant in variants_of(cell, guarded)}
    stock = ran["stock"]
    reference = ran.get("oracle", stock)["final"]
    row: Row = {
        "name": cell.name,
        "half": cell.half,
        "group": cell.group,
        "kind": cell.kind,
        "title": cell.title,
        "model": cell.task,
        "time": cell.time,
        "seed": cell.seed,
        "plain": bool(cell.fault and cell.fault.plain),
        "cause_expected": cell.fault.cause if cell.fault else None,
        "onset": cell.bad_steps[0] if cell.bad_steps else None,
        "reference": reference,
        "stock": stock["final"] / reference,
    }
    if "rollback" in ran:
        row |= _rolled_back(cell, ran["rollback"], stock, reference)
    if "stop" in ran:
        row |= _stopped(cell, ran["stop"], stock)
    row["error"] = "; ".join(filter(None, (ran[variant].get("error") for variant in guarded)))
    row |= _cause(cell, [ran[variant] for variant in guarded])
    return row


def _rolled_back(cell: Cell, outcome: dict[str, Any], stock: dict[str, Any], reference: float) -> Row:
    events = outcome["events"]
    first = cell.bad_steps[0] if cell.bad_steps else 0
    acted = [
        event["step"] for event in events if event["step"] is not None and event["event"] not in NO_ACTION
    ]
    after = [step for step in acted if step >= first]
    final = outcome["final"]
    return {
        "rollback": final / reference,
        "harmed": math.isfinite(stock["final"]) and not final <= WORSE * stock["final"],
        "rollbacks": sum(event["event"] == "rollback" for event in events),
        "gave_up": bool(outcome["gave_up"]),
        "touched": outcome["weights"] != stock["weights"],
        "acted": bool(acted) or bool(outcome["gave_up"]),
        "too_early": any(step < first for step in acted),
        "rollback_delay": min(after) - first if cell.bad_steps and after else None,
        "lost": _lost(cell, outcome),
        "where": ", ".join(
            f"{event['step']} to {event['target']}" for event in events if event["event"] == "rollback"
        ),
    }


def _lost(cell: Cell, outcome: dict[str, Any]) -> int:
    """Return the updates that the run lacks and that were not bad: undone, skipped, or after it was ended."""
    gone: set[int] = set(range(outcome["last_step"] + 1, STEPS + 1))
    for event in outcome["events"]:
        if event["event"] == "rollback" and event["undone"]:
            gone |= set(range(event["undone"][0], event["undone"][1] + 1))
        elif "skip" in str(event["event"]):
            gone.add(event["step"])
    return len(gone - set(cell.bad_steps))


def _stopped(cell: Cell, outcome: dict[str, Any], stock: dict[str, Any]) -> Row:
    first = cell.bad_steps[0] if cell.bad_steps else 0
    last = outcome["last_step"]
    ended = last < STEPS or (outcome["finding"] is not None and outcome["finding"]["step"] == last)
    return {
        "stopped_at": last if ended else None,
        "stop_delay": last - first if ended and cell.bad_steps and last >= first else None,
        "stop_touched": outcome["weights"] != stock["weights"] or ended,
    }


def _cause(cell: Cell, outcomes: list[dict[str, Any]]) -> Row:
    """Return the first cause that was named, and whether it is right; ``None`` where none was named or expected."""
    named = [event["cause"] for outcome in outcomes for event in outcome["events"]]
    named += [outcome["finding"]["cause"] for outcome in outcomes if outcome["finding"] is not None]
    given = next((cause for cause in named if cause is not None), None)
    expected = cell.fault.cause if cell.fault is not None else "data" if cell.group == "switch" else None
    if given is None or (cell.fault is not None and expected is None):
        return {"cause": given, "cause_right": None}
    if cell.fault is None:
        return {"cause": given, "cause_right": given != "weights"}
    return {"cause": given, "cause_right": given == expected}
