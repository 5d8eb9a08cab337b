"""What a safe save costs: the time of our save over that of the stock Trainer's.

Both save checkpoints of the same size in turn, in one process. Each pair gives one ratio, and the
order within the pairs alternates. Processor time depends less on the load of the machine and its
disk, so it is given beside the time by the clock. Before a save is timed, all data of the other
one is written to the disk (``os.sync``). A save is all that the Trainer does for it, the deletion
of the previous checkpoint included (``save_total_limit=1``).

    python -m benchmarks.save_cost                  # 10 MB and 500 MB, some minutes
    python -m benchmarks.save_cost --sizes 10 --pairs 10
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
)

import argparse
import gc
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments

from benchmarks.machine import machine
from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
from tests.tiny import RandomRows, base_arguments, gpt2

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
logging.getLogger("hf_divguard").setLevel(logging.ERROR)

VARIANTS: dict[str, dict[str, Any] | None] = {
    "stock against stock": None,
    "staged (default)": {"divguard_save_mode": "staged"},
    "in place": {"divguard_save_mode": "in_place"},
    "staged, checksums": {"divguard_save_mode": "staged", "divguard_checksums": True},
    "staged, flushed": {"divguard_save_mode": "staged", "divguard_fsync": True},
}
SHAPES = {10: (128, 4), 50: (256, 5), 500: (640, 8)}
"""Width and layers of a GPT-2 whose checkpoint, optimizer included, has about so many megabytes."""


def make_saver(run_dir: Path, size: int, options: dict[str, Any] | None) -> Any:
    """Return a Trainer that has trained one step, so that it has all the state there is to save."""
    width, layers = SHAPES[size]
    common = base_arguments(
        run_dir, max_steps=1, save_strategy="no", save_total_limit=1, logging_strategy="no"
    )
    model = gpt2(vocabulary=256, length=8, width=width, layers=layers, heads=4, dropout=0.1)
    rows = RandomRows(4, 8, vocabulary=256)
    if options is None:
        trainer: Any = Trainer(model=model, args=TrainingArguments(**common), train_dataset=rows)
    else:
        args = DivGuardTrainingArguments(**common, **options)
        trainer = DivGuardTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    # As many entries as a run of some length has logged: `trainer_state.json` is part of a checkpoint.
    trainer.state.log_history = [
        {"epoch": step / 100, "grad_norm": 1.2345678, "learning_rate": 1e-4, "loss": 2.3456789, "step": step}
        for step in range(200)
    ]
    return trainer


def timed_save(trainer: Any) -> tuple[float, float]:
    """Return the seconds that a save takes, by the clock and of the processor."""
    trainer.state.global_step += 1
    gc.collect()
    os.sync()
    began, worked = time.perf_counter(), time.process_time()
    trainer._save_checkpoint(trainer.model, None)
    return time.perf_counter() - began, time.process_time() - worked


def compare(root: Path, size: int, pairs: int) -> list[list[str]]:
    """Time every variant against the stock Trainer; return the rows of the table."""
    stock = make_saver(root / "stock", size, None)
    timed_save(stock)
    (saved,) = (root / "stock").glob("checkpoint-*")
    megabytes = sum(path.stat().st_size for path in saved.iterdir()) / 1e6
    rows = []
    for name, options in VARIANTS.items():
        other = make_saver(root / "other", size, options)
        timed_save(other), timed_save(stock)
        times: list[tuple[tuple[float, float], tuple[float, float]]] = []
        for number in range(pairs):
            if number % 2:
                of_other = timed_save(other)
                of_stock = timed_save(stock)
            else:
                of_stock = timed_save(stock)
                of_other = timed_save(other)
            times.append((of_stock, of_other))
        by_clock = [of_other[0] / of_stock[0] for of_stock, of_other in times]
        of_processor = [of_other[1] / of_stock[1] for of_stock, of_other in times]
        low, middle, high = statistics.quantiles(by_clock, n=4)
        more = statistics.median(of_other[0] - of_stock[0] for of_stock, of_other in times)
        rows.append(
            [
                name,
                f"{megabytes:.0f} MB",
                str(pairs),
                f"{statistics.median(of_stock[0] for of_stock, _ in times) * 1e3:.1f}",
                f"{more * 1e3:+.1f}",
                f"**{middle:.3f}**",
                f"{low:.3f} to {high:.3f}",
                f"{statistics.median(of_processor):.3f}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
        shutil.rmtree(root / "other")
        del other
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(SHAPES), default=[10, 500])
    parser.add_argument(
        "--pairs", type=int, default=None, help="pairs per row (default 60, and 15 for 500 MB)"
    )
    parser.add_argument(
        "--dir", type=Path, default=None, help="where to save; the temporary folder without it"
    )
    parser.add_argument("--out", type=Path, default=None, help="file for the table")
    options = parser.parse_args()
    head = [
        "save",
        "checkpoint",
        "pairs",
        "stock, ms",
        "more, ms",
        "ratio, median",
        "middle half",
        "ratio of processor time",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="save-cost-", dir=options.dir) as root:
            rows = compare(Path(root), size, options.pairs or (15 if size >= 500 else 60))
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join(
        [
            machine(),
            "",
            *lines,
            "",
        ]
    )
    if options.out is not None:
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
