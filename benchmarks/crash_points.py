"""Try every state that a kill or a power failure can leave behind, and print how many went wrong.

For each operation on checkpoints, on a disk that renames folders and on one that does not: every
prefix of its file operations (a kill), also on a disk that lists names that are gone, and every way
in which up to three unflushed operations (two, for saves by two ranks) are lost after each prefix: a
power failure, with ``divguard_fsync``. After each state: nothing that is incomplete counts as
complete, the best and the newest good checkpoint are there, and a resume finds the newest.
``tests/storage/crash_points.py`` says what the model of the file system leaves out.

    python benchmarks/crash_points.py            # some minutes on two cores
    python benchmarks/crash_points.py --short
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine
from tests.storage.crash_points import OPERATIONS, Table, explore

Job = tuple[int, bool, int, bool]


def try_all(job: Job) -> Table:
    number, staged, most_lost, stale = job
    if "two ranks" in OPERATIONS[number].name:
        most_lost = min(most_lost, 2)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="crash-points-", dir=memory) as work:
        return explore(
            Path(work),
            OPERATIONS[number],
            staged=staged,
            flush=most_lost > 0,
            most_lost=most_lost,
            stale=stale,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="lose one operation at most")
    parser.add_argument("--lost", type=int, default=3, help="lose so many operations at most")
    parser.add_argument("--only", default="", help="only operations with this text in their name")
    options = parser.parse_args()
    most_lost = 1 if options.short else options.lost
    jobs: list[Job] = [
        (number, staged, lost, stale)
        for lost, stale in ((0, False), (0, True), (most_lost, False))
        for number in range(len(OPERATIONS))
        for staged in (True, False)
        if options.only in OPERATIONS[number].name
        if staged or "resume" not in OPERATIONS[number].name
    ]
    began = time.monotonic()
    tables: dict[tuple[str, bool], list[Table]] = {}
    wrong: list[str] = []
    with ProcessPoolExecutor(2) as pool:
        for job, table in zip(jobs, pool.map(try_all, jobs), strict=True):
            name = OPERATIONS[job[0]].name.partition(",")[0]
            tables.setdefault((name, job[1]), []).append(table)
            wrong += table.wrong
    print("| operation | folders | states | different | wrong |\n|---|---|---|---|---|")
    for (name, staged), each in tables.items():
        numbers = [
            sum(t.tried for t in each),
            sum(t.different for t in each),
            sum(len(t.wrong) for t in each),
        ]
        print(
            f"| {name} | {'renamed' if staged else 'in place'} | "
            + " | ".join(f"{n:,}" for n in numbers)
            + " |"
        )
    tried = sum(table.tried for each in tables.values() for table in each)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"\n{tried:,} states in {time.monotonic() - began:.0f} s, {len(wrong)} wrong. Processor time "
        f"{used.ru_utime + used.ru_stime:.0f} s. {machine()}"
    )
    for line in wrong[:20]:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
