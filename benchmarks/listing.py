"""What many checkpoints in one folder cost: listing them, and the bookkeeping of one more save.

Writes folders with the files of a small checkpoint, a sidecar and a manifest each, as a run without
``save_total_limit`` does. Then it times ``find_checkpoints``, ``latest_complete_checkpoint``,
``best_checkpoints`` and the start of a training, and what a save does beside writing the weights, at
few and at many checkpoints. Processor time is given beside the time by the clock.

    python benchmarks/listing.py                    # 5,000 checkpoints
    python benchmarks/listing.py --checkpoints 200
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hf_divguard import best_checkpoints, find_checkpoints, latest_complete_checkpoint
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.manifest import build_manifest, write_manifest
from hf_divguard.storage.sidecar import write_sidecar
from hf_divguard.storage.staging import publish, staging_folder

NAMES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "training_args.bin",
)
FEW = 5
SAVES = 40


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return how long ``work`` takes by the clock, and in processor time."""
    began, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - worked


def write_host_files(folder: Path, step: int) -> None:
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(b"x")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))


def keep_books(run: Path, ledger: CheckpointLedger, step: int) -> None:
    """Do what a save does beside the host's own files: rank, note, certify, publish, look for what may go."""
    folder = staging_folder(run) / f"checkpoint-{step}"
    ledger.add(step, 2 + math.sin(step))
    sidecar = ledger.sidecar(
        step, metric_name="eval_loss", greater_is_better=False, callbacks={"Detector": {"ema": 1.5}}
    )
    write_sidecar(folder, sidecar)
    manifest = build_manifest(
        folder,
        step=step,
        run_id=sidecar.run_id,
        sequence=sidecar.sequence,
        world_size=1,
        metric_name=sidecar.metric_name,
        metric=sidecar.metric,
        greater_is_better=False,
        weights=True,
        training_state=True,
    )
    write_manifest(folder, manifest)
    publish(run, step)
    ledger.finite_best(False)
    ledger.to_delete(None, 1, False)


def saves(run: Path, ledger: CheckpointLedger, first: int, count: int) -> list[tuple[float, float]]:
    times = []
    for step in range(first, first + count):
        write_host_files(staging_folder(run) / f"checkpoint-{step}", step)
        times.append(seconds(lambda step=step: keep_books(run, ledger, step)))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=int, default=5000)
    options = parser.parse_args()
    many = options.checkpoints
    with tempfile.TemporaryDirectory(prefix="listing-") as root:
        run = Path(root)
        ledger = CheckpointLedger(str(run), "run", [], "eval_loss")
        saves(run, ledger, 1, FEW)
        at_few = saves(run, ledger, FEW + 1, SAVES)
        saves(run, ledger, FEW + SAVES + 1, many - FEW - 2 * SAVES)
        at_many = saves(run, ledger, many - SAVES + 1, SAVES)
        last = str(run / f"checkpoint-{many}")
        calls: dict[str, Callable[[], object]] = {
            "find_checkpoints": lambda: find_checkpoints(run),
            "latest_complete_checkpoint": lambda: latest_complete_checkpoint(run),
            "best_checkpoints(3)": lambda: best_checkpoints(run, 3),
            "start of a training": lambda: CheckpointLedger.read(str(run), last, "eval_loss"),
        }
        print(f"{many} checkpoints | seconds | processor seconds")
        for name, call in calls.items():
            times = [seconds(call) for _ in range(3)]
            print(f"{name} | {min(time[0] for time in times):.2f} | {min(time[1] for time in times):.2f}")
        few, much = (
            [statistics.median(t[at] for t in times) * 1e3 for at in (0, 1)] for times in (at_few, at_many)
        )
        print(
            f"bookkeeping of a save, ms (processor ms): {few[0]:.2f} ({few[1]:.2f}) at {FEW} to {FEW + SAVES}, "
            f"{much[0]:.2f} ({much[1]:.2f}) at {many}"
        )
        sizes = [(run / f"checkpoint-{step}" / "divguard_state.json").stat().st_size for step in (50, many)]
        print(f"bytes of a sidecar: {sizes[0]} at 50, {sizes[1]} at {many}")


if __name__ == "__main__":
    main()
