"""Judge the guard on runs with faults, on data switches and on healthy runs.

    python -m benchmarks.recovery --half design --jobs 2     # while constants are chosen
    python -m benchmarks.recovery --half judge --write       # what is reported; writes docs/recovery
    python -m benchmarks.recovery --half design --only rate_x30
    python -m benchmarks.recovery --half design --only fault/ --sample 40
    python -m benchmarks.recovery --short                    # for continuous integration

Outcomes are kept in a folder, so a benchmark that was interrupted goes on where it was, and stock and oracle runs are
made once. Guarded runs are made again when the package has changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.recovery.cache import Cache
from benchmarks.recovery.cells import STEPS, Cell
from benchmarks.recovery.judge import Row, compare, fill, missing
from benchmarks.recovery.kinds import page
from benchmarks.recovery.report import summary, write
from benchmarks.recovery.runs import GUARDED, SAVE_EVERY
from benchmarks.recovery.selection import select

DOCS = Path(__file__).parents[2] / "docs" / "recovery"
SHORT_AIM = 1.1


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--half", choices=("design", "judge", "both"), default="both")
    parser.add_argument(
        "--only", metavar="PATTERN", help="cells whose name contains this; * and ? are wildcards"
    )
    parser.add_argument(
        "--short", action="store_true", help="a few cells; exit code 1 if the guard fails on them"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="so many of the cells, always the same ones")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of all runs; also moves the faults by some steps"
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=GUARDED,
        default=list(GUARDED),
        help="no value: stock and oracle only",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the guard that is not at its default, such as divguard_cooldown_steps=40; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("recovery_output"), help="folder for outcomes and reports"
    )
    parser.add_argument(
        "--again", action="store_true", help="repeat the guarded runs even if nothing has changed"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cells and end")
    parser.add_argument(
        "--write", action="store_true", help="write table.md, table.csv and kinds.md into docs/recovery"
    )
    return parser.parse_args()


def guard_options(pairs: list[str]) -> dict[str, Any]:
    """Return options as the arguments take them.

    Raises:
        SystemExit: If one is not of the form NAME=VALUE.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found:
            raise SystemExit(f"`--option` must be NAME=VALUE, found '{pair}'.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def failures(rows: list[Row]) -> list[str]:
    """Return what a short run may not show."""
    found = [f"{row['name']}: {row['error']}" for row in rows if row["error"]]
    for row in rows:
        if row["group"] == "fault" and row["plain"] and not row["rollback"] <= SHORT_AIM:
            found.append(
                f"{row['name']}: {row['rollback']:.3f} of the oracle, at most {SHORT_AIM} is allowed"
            )
        if row["group"] != "fault" and (row["touched"] or row["stop_touched"]):
            found.append(
                f"{row['name']}: nothing is wrong in this run, but the guard acted ({row['where'] or 'stop'})"
            )
    return found


def judged(cells: list[Cell], parsed: argparse.Namespace) -> tuple[list[Row], str]:
    """Make the runs that are missing; return the rows, and a sentence on how they were made."""
    options, guarded = guard_options(parsed.option), tuple(parsed.variants)
    cache, began = Cache(parsed.out), time.perf_counter()
    jobs = missing(cells, guarded, options, cache, parsed.again)
    print(f"{len(cells)} cells, {len(jobs)} runs to make", flush=True)
    fill(jobs, cache, parsed.jobs)
    rows = [compare(cell, options, cache, guarded) for cell in cells]
    changed = ", ".join(f"`{name}={value}`" for name, value in options.items())
    note = (
        f"{len(cells)} cells of {STEPS} steps, a checkpoint every {SAVE_EVERY} steps, seed {parsed.seed}; "
        f"detector `adaptive`, {f'{changed}, other' if changed else 'all'} options at their defaults. "
        f"{len(jobs)} runs took {(time.perf_counter() - began) / 60:.0f} minutes."
    )
    return rows, note


def main() -> int:
    """Run the benchmark."""
    parsed = arguments()
    warnings.filterwarnings("ignore")
    cells = select(parsed.half, parsed.only, parsed.seed, short=parsed.short, sample=parsed.sample)
    if parsed.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    rows, note = judged(cells, parsed)
    for half in dict.fromkeys(row["half"] for row in rows):
        print(f"\n{half} half\n" + "\n".join(summary([row for row in rows if row["half"] == half])))
    name = f"report-{parsed.half}"
    write(rows, note, parsed.out, name)
    print(f"\nReport: {parsed.out / name}.md, cells: {parsed.out / name}.csv")
    if parsed.write:
        write(rows, note, DOCS)
        (DOCS / "kinds.md").write_text(page(), encoding="utf-8")
        print(f"Written: table.md, table.csv and kinds.md in {DOCS}")
    wrong = failures(rows) if parsed.short and len(parsed.variants) == len(GUARDED) else []
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
