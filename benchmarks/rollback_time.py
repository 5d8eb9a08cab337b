"""Time from a finding to the end of the next step: rolled back in place, or left and entered again.

Pairs of runs of the same small model, in turns. In place, from disk and from memory, it is the time between the end
of the step that is found bad and the end of the next one. Left and entered again, training stops at that step, and
``train(resume_from_checkpoint=...)`` of the same trainer resumes from the same checkpoint in the same process: a new
process would also have to import everything and build the model. Both include the time of a step itself.

    python -m benchmarks.rollback_time            # writes docs/recovery/time.md
    python -m benchmarks.rollback_time --short    # for continuous integration
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed

from benchmarks.machine import machine
from hf_divguard import DivergenceDetector, DivGuardTrainer, DivGuardTrainingArguments
from tests.hf.faults import ScriptedRule
from tests.tiny import RandomRows, base_arguments

BAD_STEP = 30
LAST_STEP = 34
TARGET_STEP = 20


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it."""
        self.ends.append((state.global_step, time.perf_counter()))

    def after_bad_step(self) -> float:
        """Return the seconds from the end of the bad step to that of the next step made."""
        place = next(place for place, (step, _) in enumerate(self.ends) if step == BAD_STEP)
        return self.ends[place + 1][1] - self.ends[place][1]


def small_model(hidden: int) -> LlamaForCausalLM:
    """Return the model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def make_trainer(folder: Path, action: str, hidden: int, clock: Clock, **options: Any) -> DivGuardTrainer:
    """Return a trainer of the small model."""
    set_seed(0)
    common = {"max_steps": LAST_STEP, "per_device_train_batch_size": 8, "save_steps": TARGET_STEP}
    # The scripted finding has no fault behind it, so a comparison of weights would refuse the rollback.
    options["divguard_compare"] = "off"
    args = DivGuardTrainingArguments(**base_arguments(folder, learning_rate=5e-5, **common, **options))
    # The onset is just after the checkpoint that is restored.
    detector = DivergenceDetector(ScriptedRule({BAD_STEP: TARGET_STEP + 2}), action=action)
    trainer = DivGuardTrainer(
        model=small_model(hidden),
        args=args,
        train_dataset=RandomRows(1024, 32, vocabulary=512),
        callbacks=[clock, detector],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def in_place(folder: Path, hidden: int, *, memory: bool) -> tuple[float, float]:
    """Roll back in place; return the time to the next step, and that of the rollback alone."""
    clock = Clock()
    options = {"divguard_snapshot_steps": TARGET_STEP} if memory else {}
    trainer = make_trainer(folder, "rollback", hidden, clock, **options)
    trainer.train()
    (event,) = trainer.divguard_events
    assert event["target"] == ("memory" if memory else f"checkpoint-{TARGET_STEP}")
    return clock.after_bad_step(), event["seconds"]


def entered_again(folder: Path, hidden: int) -> float:
    """Stop, and resume from the same checkpoint; return the time to the next step."""
    clock = Clock()
    trainer = make_trainer(folder, "abort", hidden, clock)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{TARGET_STEP}"))
    return clock.after_bad_step()


def measure(hidden: int, pairs: int) -> dict[str, list[float]]:
    """Return the seconds of each way, pair by pair."""
    seconds: dict[str, list[float]] = {
        "disk": [],
        "disk alone": [],
        "memory": [],
        "memory alone": [],
        "again": [],
    }
    for number in range(pairs + 1):
        with tempfile.TemporaryDirectory() as folder:
            disk, disk_alone = in_place(Path(folder, "disk"), hidden, memory=False)
            again = entered_again(Path(folder, "again"), hidden)
            memory, memory_alone = in_place(Path(folder, "memory"), hidden, memory=True)
        if number == 0:
            continue  # everything is slower the first time
        for name, value in zip(seconds, (disk, disk_alone, memory, memory_alone, again), strict=True):
            seconds[name].append(value)
    return seconds


def row(name: str, values: list[float], again: list[float] | None) -> str:
    """Return one line of the table."""
    ratio = (
        ""
        if again is None
        else f"{statistics.median(a / v for a, v in zip(again, values, strict=True)):.1f} times"
    )
    return f"| {name} | {1000 * statistics.median(values):.1f} ms | {ratio} |"


def main() -> int:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="few pairs, nothing written: shows that it runs")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=64, help="width of the model")
    options = parser.parse_args()
    pairs = 3 if options.short else options.pairs
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_divguard").setLevel(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    seconds = measure(options.hidden, pairs)
    weights = sum(weight.numel() for weight in small_model(options.hidden).parameters())
    again = seconds["again"]
    text = "# Time from a bad step to the next one\n\n" + "\n".join(
        [
            "| from the end of the bad step to the end of the next | median | faster |",
            "|---|---|---|",
            row("left and entered again with `train(resume_from_checkpoint=...)`", again, None),
            row("rolled back in place from disk, and saved under the present step", seconds["disk"], again),
            row("rolled back in place from memory", seconds["memory"], again),
            row("the rollback alone, from disk", seconds["disk alone"], again),
            row("the rollback alone, from memory", seconds["memory alone"], again),
            "",
            f"{pairs} pairs, a model of {weights:,} weights, one thread. {machine()}",
            "",
        ]
    )
    print(text)
    if not options.short:
        path = Path(__file__).parents[1] / "docs" / "recovery" / "time.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
