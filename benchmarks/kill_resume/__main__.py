"""Kill a training with SIGKILL again and again, resume it, and count what went wrong.

A tiny GPT-2 with dropout trains on CPU and saves, after an evaluation, every few steps. Each
life of the training is a process of its own, forked from one that has imported everything, and
dies by SIGKILL: half of the kills come at any moment, half are aimed inside a save, the
publishing of a checkpoint, or a deletion. After each kill the training is started again with
``resume_from_checkpoint=True``, until the run is complete.

The package under test does not judge what is on disk after a kill: every file is loaded and its
values are compared with those of the same step of a run that was never killed.

    python -m benchmarks.kill_resume --short              # a minute, as continuous integration runs it
    python -m benchmarks.kill_resume --kills 100 --out table.md

Columns: kills; how many came inside a save; "broken newest": the checkpoint that the resume
would take for the newest is not complete; "resume failed": the next start ended in an error (for
the stock Trainer the broken folder is then removed by hand); "wrong place": training resumed
from another step than the newest complete checkpoint's; "best lost": one of the best checkpoints
is gone or broken (the best two of ours, the best one of the stock Trainer, which keeps no more);
"equal": runs whose final weights are those of the run that was never killed, bit for bit.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
)

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.kill_resume.runs import Reference, make_reference, run_once
from benchmarks.kill_resume.series import Counts, Series
from benchmarks.machine import machine
from tests.processes import fork, wait_for

torch.set_num_threads(1)


def work_through(
    tasks: list[tuple[Series, int, int]],
    references: dict[str, Reference],
    root: Path,
    seed: int,
    results: Path,
    keep: Path | None,
) -> None:
    """Run the series one after the other, each up to its number of kills; append the counts to ``results``."""
    for series, kills, first in tasks:
        generator = random.Random(f"{seed} {series} {results.name}")
        total = Counts()
        number = 0
        while total.kills < kills:
            number += 1
            counts = run_once(
                series,
                references[series.reference],
                root / f"{series.trainer}-{series.reference}-{number}",
                generator,
                min(kills - total.kills, generator.randint(8, 16)),
                first + total.kills,
                keep,
            )
            total.add(counts)
            if counts.kills == 0 and counts.runs == 0:
                break
            print(
                f"{time.strftime('%H:%M:%S')} {series.label} ({series.size}): {total.kills}/{kills} kills, "
                f"{total.equal}/{total.runs} runs equal, failed {total.resume_failed}",
                file=sys.stderr,
                flush=True,
            )
        with results.open("a") as file:
            file.write(json.dumps([dataclasses.asdict(series), dataclasses.asdict(total)]) + "\n")


def share_out(
    series: list[Series],
    references: dict[str, Reference],
    root: Path,
    kills: int,
    options: argparse.Namespace,
) -> tuple[dict[Series, Counts], bool]:
    """Let several processes work side by side; return the sum of the counts, and whether one of them failed."""
    shares = [(kills + worker) // options.workers for worker in range(options.workers)]
    pids = []
    for worker, share in enumerate(shares):
        tasks = [(each, share, sum(shares[:worker])) for each in series] if share else []
        own, results, log = (root / f"{kind}{worker}" for kind in ("worker", "results", "log"))
        work = partial(work_through, tasks, references, own, options.seed, results, options.keep)
        pids.append(fork(work, log))
    failed = [wait_for(pid) for pid in pids]
    rows = {each: Counts() for each in series}
    for worker in range(options.workers):
        sys.stderr.write((root / f"log{worker}").read_text())
        results = root / f"results{worker}"
        for line in results.read_text().splitlines() if results.exists() else []:
            described, counted = json.loads(line)
            rows[Series(**described)].add(Counts(**counted))
    return rows, any(failed)


def table(rows: dict[Series, Counts], references: dict[str, Reference]) -> str:
    head = [
        "series",
        "checkpoint",
        "kills",
        "inside a save (publish, delete)",
        "broken newest",
        "resume failed",
        "wrong place",
        "best lost",
        "partial folder under a checkpoint's name",
        "runs equal",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for series, c in rows.items():
        cells = [
            series.label,
            f"{references[series.reference].megabytes:.0f} MB",
            c.kills,
            f"{c.inside_save} ({c.inside_publish}, {c.inside_delete})",
            c.broken_newest,
            c.resume_failed,
            c.wrong_place,
            c.best_lost,
            c.partial_under_name,
            f"{c.equal} of {c.runs}",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    for name, of_kind in (("sum, stock", "stock"), ("sum, ours", "ours")):
        total = Counts()
        for series, counts in rows.items():
            if series.is_ours == (of_kind == "ours"):
                total.add(counts)
        if total.kills:
            lines.append(
                f"| **{name}** | | {total.kills} | {total.inside_save} ({total.inside_publish}, {total.inside_delete}) "
                f"| {total.broken_newest} | {total.resume_failed} | {total.wrong_place} | {total.best_lost} "
                f"| {total.partial_under_name} | {total.equal} of {total.runs} |"
            )
    return "\n".join(lines)


def all_series(short: bool, only: str) -> list[Series]:
    if short:
        series = [Series("staged"), Series("in_place"), Series("staged", ranks=2), Series("stock")]
    else:
        series = [
            Series(trainer, ranks, size)
            for ranks, size in ((1, "small"), (1, "large"), (2, "small"))
            for trainer in ("staged", "in_place", "stock")
        ]
    return [each for each in series if only in f"{each.label}, {each.size}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=None, help="kills per series (default 100, short form 8)"
    )
    parser.add_argument("--short", action="store_true", help="four series of small checkpoints")
    parser.add_argument("--only", default="", help="only the series with this text in their name")
    parser.add_argument("--keep", type=Path, default=None, help="folder for what went wrong, to look at")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--workers", type=int, default=2, help="how many runs go on side by side")
    parser.add_argument(
        "--out", type=Path, default=None, help="file for the table; standard output without it"
    )
    options = parser.parse_args()
    kills = options.kills or (8 if options.short else 100)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as name:
        root = Path(name)
        series = all_series(options.short, options.only)
        references: dict[str, Reference] = {}
        for each in series:
            if each.reference not in references:
                references[each.reference] = make_reference(each, root / f"reference-{each.reference}")
        rows, failed = share_out(series, references, root, kills, options)
    text = f"{machine()} Seed {options.seed}, {time.monotonic() - began:.0f} seconds.\n\n{table(rows, references)}\n"
    if options.out is not None:
        options.out.write_text(text)
    print(text)
    for counts in rows.values():
        for note in counts.notes:
            print("-", note)
    ours = Counts()
    for each, counts in rows.items():
        if each.is_ours:
            ours.add(counts)
    bad = ours.broken_newest + ours.resume_failed + ours.wrong_place + ours.best_lost
    return 1 if bad or ours.runs > ours.equal or failed or not ours.runs else 0


if __name__ == "__main__":
    sys.exit(main())
