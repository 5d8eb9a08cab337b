"""How long the commands of ``hf-divguard`` take: on a usual folder, on many checkpoints, on a long log.

Each command is started as a user starts it, in a fresh process, several times; the fastest and the
median are given, and the processor time of the fastest. The folders hold the files of a small checkpoint
with sidecar and manifest each, as a run without ``save_total_limit`` leaves them.

    python -m benchmarks.command_line                      # 10,000 checkpoints, 1,000,000 log lines
    python -m benchmarks.command_line --checkpoints 500 --lines 50000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.listing import saves
from hf_divguard.storage.ledger import CheckpointLedger

USUAL = 6


def timed(*words: str, times: int = 3) -> tuple[float, float, float]:
    """Return the fastest and the median time of a command by the clock, and the least processor time."""
    clock, processor = [], []
    for _ in range(times):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "hf_divguard.cli", *words], capture_output=True)
        clock.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode != 0:
            raise SystemExit(done.stderr.decode())
    return min(clock), statistics.median(clock), min(processor)


def write_run(folder: Path, checkpoints: int) -> None:
    folder.mkdir()
    saves(folder, CheckpointLedger(str(folder), "run", [], "eval_loss"), 1, checkpoints)


def write_long_log(folder: Path, lines: int) -> None:
    """Write a trainer state as the Trainer does, with a falling loss."""
    folder.mkdir()
    log = [
        {
            "epoch": step / 1e5,
            "grad_norm": 1.0 + step % 7 / 10,
            "loss": 2 + 3e4 / (1e4 + step) + step % 11 / 100,
            "step": step,
        }
        for step in range(1, lines + 1)
    ]
    state = {
        "best_metric": None,
        "global_step": lines,
        "log_history": log,
        "max_steps": lines,
        "train_batch_size": 8,
    }
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="command-line-") as root:
        usual, many, log = (os.path.join(root, name) for name in ("usual", "many", "log"))
        write_run(Path(usual), USUAL)
        write_run(Path(many), options.checkpoints)
        write_long_log(Path(log), options.lines)
        commands = {
            "--help": ("--help",),
            f"status, {USUAL} checkpoints": ("status", usual),
            f"list, {USUAL} checkpoints": ("list", usual),
            f"best, {USUAL} checkpoints": ("best", usual),
            f"status, {options.checkpoints} checkpoints": ("status", many),
            f"list, {options.checkpoints} checkpoints": ("list", many),
            f"best, {options.checkpoints} checkpoints": ("best", many),
            f"status, {options.lines} log lines": ("status", log),
            f"report, {options.lines} log lines": ("report", log, "-o", os.path.join(root, "page.html")),
            f"replay adaptive, {options.lines} log lines": ("replay", log),
            f"replay nonfinite, {options.lines} log lines": ("replay", log, "--detector", "nonfinite"),
        }
        both = os.path.join(root, "both")
        write_run(Path(both), options.checkpoints)
        os.link(os.path.join(log, "trainer_state.json"), os.path.join(both, "trainer_state.json"))
        commands[f"status, {options.checkpoints} checkpoints and {options.lines} log lines"] = (
            "status",
            both,
        )
        print("| command | fastest, s | median, s | processor, s |\n|---|---|---|---|")
        for name, words in commands.items():
            figures = timed(*words, times=1 if words[0] in ("replay", "report") else 3)
            print(f"| {name} | " + " | ".join(f"{each:.2f}" for each in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
