"""Kill one rank of sharded runs at random moments, and resume: nothing may be broken, nothing may hang.

Each run is killed again and again until it comes to its end; then it must be the run that was
never killed: the same events, and the same weights on each rank to the bit.

A kill in the set-up, before training begins, may leave the other rank in PyTorch's own wait for the rank that is gone,
which a launcher such as ``torchrun`` ends. That is counted apart, as ``held_in_set_up``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_divguard import find_checkpoints
from tests.fork_server import ForkServer
from tests.hf.engines import killed

RANKS = 2
PATIENCE = 30.0


@dataclass
class Counts:
    """What was seen."""

    kills: int = 0
    at_failpoints: int = 0
    in_set_up: int = 0
    held_in_set_up: int = 0
    runs: int = 0
    broken_checkpoints: int = 0
    hangs: int = 0
    failed_resumes: int = 0
    other_results: int = 0
    longest_wait_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def main() -> None:
    """Kill until there were enough kills, or the time is over; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="fsdp2")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="three kills")
    given = parser.parse_args()
    wanted = 3 if given.short else given.kills
    counts, lot = Counts(), random.Random(given.seed)
    until = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        server = ForkServer(Path(folder))
        never = run(server, Path(folder, "never"), given.engine)
        reference, seconds = [each.check() for each in never], max(each.seconds for each in never)
        while counts.kills < wanted and time.monotonic() < until:
            one_run(server, Path(folder, f"run{counts.runs}"), given.engine, reference, counts, lot, seconds)
            counts.runs += 1
            print(json.dumps(asdict(counts)), flush=True)
        server.close()


def run(server: ForkServer, folder: Path, engine: str, **how: Any) -> list[Any]:
    """Train or resume on all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    return server.run(killed.train_or_resume, RANKS, folder=folder, engine=engine, timeout=240.0, **how)


def one_run(
    server: ForkServer,
    folder: Path,
    engine: str,
    reference: list[Any],
    counts: Counts,
    lot: random.Random,
    seconds: float,
) -> None:
    """Kill a run up to four times, then let it come to its end; compare it with ``reference``."""
    for attempt in range(4):
        at_failpoint = lot.random() < 0.5
        moment: Any = lot.choice(killed.MOMENTS) if at_failpoint else lot.uniform(0.1, 1.0) * seconds
        bad_rank = lot.randrange(RANKS)
        outcomes = run(
            server, folder, engine, moment=moment, bad_rank=bad_rank, count=lot.choice((1, 1, 2, 3))
        )
        ended = time.time()
        if outcomes[bad_rank].error != "it ended with -9":
            compare(outcomes, reference, counts, f"run {counts.runs}, not killed at attempt {attempt}")
            return
        counts.kills += 1
        counts.at_failpoints += at_failpoint
        count_wait(folder, outcomes[1 - bad_rank], ended, counts, moment)
        for each in find_checkpoints(folder):
            if each.verdict.status == "complete" and not each.verdict.resumable:
                counts.broken_checkpoints += 1
                counts.notes.append(f"run {counts.runs}: {each.path}: {each.verdict.reason}")
    compare(run(server, folder, engine), reference, counts, f"run {counts.runs}, after four kills")


def count_wait(folder: Path, other: Any, ended: float, counts: Counts, moment: Any) -> None:
    """Count a kill, and how long the other rank went on after it."""
    killed_at, had_begun = killed.when_killed(folder)
    waited = ended - killed_at
    counts.in_set_up += not had_begun
    if waited <= PATIENCE and other.error != "it did not end in time":
        counts.longest_wait_seconds = max(counts.longest_wait_seconds, round(waited, 1))
        return
    if had_begun:
        counts.hangs += 1
    else:
        counts.held_in_set_up += 1
    where = "training" if had_begun else "the set-up"
    counts.notes.append(
        f"run {counts.runs}: {waited:.0f} s after a kill in {where} at {moment}: {other.log[-2500:]}"
    )


def compare(outcomes: list[Any], reference: list[Any], counts: Counts, which: str) -> None:
    """Note if a run failed or ended in another way than ``reference``."""
    errors = [each.error for each in outcomes if each.error is not None]
    if errors:
        counts.failed_resumes += 1
        counts.notes.append(f"{which}: {errors[0][:300]}: {outcomes[0].log[-2500:]}")
    elif [each.value for each in outcomes] != reference:
        counts.other_results += 1
        counts.notes.append(f"{which}: it ended in another way")


if __name__ == "__main__":
    main()
