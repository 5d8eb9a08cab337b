"""Put six faults of a few steps into runs under each engine, and compare how they end with the healthy run.

    python -W ignore -m benchmarks.engines.recovery                                # all engines that are installed
    python -W ignore -m benchmarks.engines.recovery --engines fsdp2 --seeds 1 2    # some of them
    python -W ignore -m benchmarks.engines.recovery --short                        # for continuous integration

The aim is a loss of at most 1.01 times that of the healthy run in the median, and of 1.05 in each run. The oracle is
the run that leaves out the updates that a fault spoils, by a learning rate of 0, and no others: what it loses is lost
without a guard's doing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.engines import faulty
from benchmarks.machine import machine
from tests.fork_server import ForkServer

ENGINES = {
    "ddp": 2,
    "fsdp2": 4,
    "fsdp2-full": 2,
    "fsdp1": 2,
    "distributed-config": 2,
    "zero1": 2,
    "zero2": 2,
    "zero3": 2,
}
"""The engines, with the number of ranks."""
MEDIAN_AIM, AIM = 1.01, 1.05
PATIENCE = 1500.0

Row = dict[str, Any]


def rows_of(engine: str, seed: int, outcomes: list[Any]) -> list[Row]:
    """Return one row for each fault, from how the runs ended on each rank."""
    ranks = [outcome.check() for outcome in outcomes]
    first = ranks[0]
    healthy = first["healthy"]
    if healthy["events"]:
        raise RuntimeError(f"Nothing is wrong in the healthy run, but the guard acted: {healthy['events']}.")
    return [
        {
            "engine": engine,
            "seed": seed,
            "fault": fault,
            "to_healthy": first[fault]["loss"] / healthy["loss"],
            "to_oracle": first[fault]["loss"] / first[oracle]["loss"],
            "rollbacks": [event[1:] for event in first[fault]["events"] if event[0] == "rollback"],
            "skipped": sum(event[0] == "update_skipped" for event in first[fault]["events"]),
            "same_on_all_ranks": all(rank[fault]["events"] == first[fault]["events"] for rank in ranks),
            "error": first[fault]["error"],
        }
        for fault, oracle in faulty.ORACLE_OF.items()
    ]


def table(rows: list[Row]) -> str:
    """Return the table: one line for each engine."""
    lines = [
        "| engine | ranks | runs | loss, times the healthy one: median | largest | times the oracle: median | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        of_it = [row for row in rows if row["engine"] == engine]
        healthy, oracle = ([row[key] for row in of_it] for key in ("to_healthy", "to_oracle"))
        figures = [statistics.median(healthy), max(healthy), statistics.median(oracle), max(oracle)]
        cells = [engine, str(ENGINES[engine]), str(len(of_it)), *(f"{figure:.3f}" for figure in figures)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def failures(rows: list[Row]) -> list[str]:
    """Return what must not be."""
    found = []
    for row in rows:
        which = f"{row['engine']}, seed {row['seed']}, {row['fault']}"
        if row["error"]:
            found.append(f"{which}: {row['error']}")
        elif not row["to_healthy"] <= AIM:
            found.append(f"{which}: {row['to_healthy']:.3f} of the healthy loss, at most {AIM} is allowed")
        if not row["same_on_all_ranks"]:
            found.append(f"{which}: the ranks did not do the same")
    for engine in dict.fromkeys(row["engine"] for row in rows):
        median = statistics.median(row["to_healthy"] for row in rows if row["engine"] == engine)
        if not median <= MEDIAN_AIM:
            found.append(f"{engine}: {median:.3f} of the healthy loss in the median, at most {MEDIAN_AIM}")
    return found


def main() -> int:
    """Run the faults; print each run, the table and what must not be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--short", action="store_true", help="DistributedDataParallel and FSDP2, one seed")
    given = parser.parse_args()
    engines, seeds = (["ddp", "fsdp2"], [1]) if given.short else (given.engines, given.seeds)
    if importlib.util.find_spec("deepspeed") is None:
        engines = [engine for engine in engines if not engine.startswith("zero")]
    rows, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        server = ForkServer(Path(folder))
        for engine in engines:
            for seed in seeds:
                where = Path(folder, f"{engine}-{seed}")
                how = {"engine": engine, "seed": seed, "folder": where, "timeout": PATIENCE}
                made = rows_of(engine, seed, server.run(faulty.train, ENGINES[engine], **how))
                print("\n".join(map(json.dumps, made)), flush=True)
                rows += made
        server.close()
    print(f"\n{table(rows)}\n\n{(time.monotonic() - began) / 60:.0f} minutes. {machine()}")
    wrong = failures(rows)
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
