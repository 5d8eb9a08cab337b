"""What a save and a rollback cost by engine, number of ranks and number of parameters; and a model of larger runs.

    python -W ignore -m benchmarks.engines.cost            # DDP, FSDP2 and ZeRO-2 on 1, 2 and 4 processes
    python -W ignore -m benchmarks.engines.cost --short    # shows that it runs

Two sizes of a model show which part of the time of an action grows with the parameters. All ranks
share the disk and the cores of one machine, so times grow with the ranks where a cluster's would not; bytes do not
depend on that. Of the times the first is that of the processor of the slowest rank, the second the least by the clock.
The checkpoint is in the page cache when it is read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engines import timed
from benchmarks.machine import machine
from tests.fork_server import ForkServer

ENGINES = ("ddp", "fsdp2", "zero2")
RANKS = (1, 2, 4)
BYTES = 12
"""Of a parameter in float32 with the two moments of Adam."""
MODELLED = (("ddp", 1e9, 8), ("fsdp2", 1e9, 8), ("fsdp2", 8e9, 8), ("fsdp2", 8e9, 64), ("fsdp2", 70e9, 64))
DISK, MEMORY = 1e9, 5e9
"""Bytes a second that the model takes for what one rank reads or writes, and for copies in its memory."""

Row = dict[str, Any]


def parameters(size: str) -> int:
    """Return the number of parameters of a size."""
    return sum(weight.numel() for weight in timed.new_model(size).parameters())


def share(engine: str, count: float, ranks: int) -> tuple[float, float]:
    """Return the bytes that a rank reads in a rollback from disk, and those that it keeps in memory."""
    part = BYTES * count / (1 if engine == "ddp" else ranks)
    return part, part


def measured(server: ForkServer, folder: Path, engine: str, ranks: int, size: str, repeats: int) -> Row:
    """Return how long everything took on the slowest rank, and the bytes."""
    where = folder / f"{engine}-{ranks}-{size}"
    how = {"folder": where, "engine": engine, "size": size, "repeats": repeats, "timeout": 500}
    seen = [outcome.check() for outcome in server.run(timed.measure, ranks, **how)]
    worked = {name: max(rank["worked"][name] for rank in seen) for name in seen[0]["worked"]}
    seconds = {f"{name}, clock": max(rank["seconds"][name] for rank in seen) for name in seen[0]["seconds"]}
    return {
        "engine": engine,
        "ranks": ranks,
        "parameters": parameters(size),
        "kept": max(rank["kept_bytes"] for rank in seen),
        "disk": seen[0]["disk_bytes"],
        "largest": seen[0]["largest_file_bytes"],
        **worked,
        **seconds,
    }


def cells(row: Row) -> list[str]:
    """Return the cells of a row: bytes a parameter, then milliseconds of a rank's processor and by the clock."""
    count = row["parameters"]
    per = [f"{row[name] / count:.1f}" for name in ("disk", "kept")]
    times = [
        (
            row[f"save{kind}"],
            row[f"read{kind}"] + row[f"put{kind}"],
            row[f"keep{kind}"],
            row[f"put back{kind}"],
        )
        for kind in ("", ", clock")
    ]
    both = [f"{1e3 * worked:.0f} / {1e3 * clock:.0f}" for worked, clock in zip(*times, strict=True)]
    return [row["engine"], str(row["ranks"]), f"{count / 1e6:.1f} M", *per, *both]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def modelled() -> list[list[str]]:
    """Return what the bytes say of larger runs: a model, nothing of it was run."""
    rows = []
    for engine, count, ranks in MODELLED:
        read, kept = share(engine, count, ranks)
        cells = [
            engine,
            f"{count / 1e9:.0f} B",
            str(ranks),
            f"{kept / 1e9:.1f} GB",
            f"{BYTES * count / 1e9:.0f} GB",
        ]
        rows.append([*cells, f"{read / DISK:.1f} s", f"{kept / MEMORY:.1f} s"])
    return rows


def main() -> None:
    """Measure, and print the two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="DDP and FSDP2, two ranks, the small model")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    engines = [
        each for each in ENGINES if not each.startswith("zero") or importlib.util.find_spec("deepspeed")
    ]
    ranks, sizes, repeats = RANKS, tuple(timed.SIZES), given.repeats
    if given.short:
        engines, ranks, sizes, repeats = ["ddp", "fsdp2"], (2,), ("small",), 1
    rows = []
    with tempfile.TemporaryDirectory(prefix="cost-") as folder:
        server = ForkServer(Path(folder))
        for engine in engines:
            for number in ranks:
                for size in sizes:
                    rows.append(measured(server, Path(folder), engine, number, size, repeats))
                    print(json.dumps(rows[-1]), flush=True)
        server.close()
    head = ["engine", "ranks", "parameters", "bytes a parameter on disk", "in memory of each rank"]
    head += ["save, ms", "rollback from disk, ms", "keep a state, ms", "rollback from memory, ms"]
    print("\n" + table(head, [cells(row) for row in rows]))
    head = ["engine", "parameters", "ranks", "a state in memory of a rank", "a checkpoint"]
    head += ["rollback from disk", "from memory"]
    print(f"\n{table(head, modelled())}\n\n{machine()}")


if __name__ == "__main__":
    main()
