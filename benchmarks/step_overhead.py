"""What guarding costs per training step: time against the stock Trainer on a tiny model.

    python -m benchmarks.step_overhead [--short] [--repeats N] [--blocks N] [--output docs/overhead.md]
    python -m benchmarks.step_overhead --compared --repeats 6 --blocks 8   # the comparison, steps of 50 ms

Two runs of the same model, one of the stock Trainer and one of the setting that is measured, take
turns in this process: ten steps of the one, ten steps of the other. Other load of the machine affects
both alike. Each block of ten steps holds one log and one check of the losses; the first blocks,
saves and evaluations are not counted. Stock runs against stock runs (the control) show how much
of a ratio is chance.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.machine import machine
from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
from hf_divguard.core.detection.adaptive import AdaptiveRule
from hf_divguard.hf.losses import StepLosses
from tests.tiny import RandomRows, base_arguments, gpt2

BLOCK = 10
"""Steps of a turn: one log and one check of the losses each."""

WARM_UP_BLOCKS = 2
"""Turns before the clock starts."""

ALL_GUARDS = {
    "divguard_detector": "adaptive",
    "divguard_action": "rollback",
    "preserve_best_model": True,
    "eval_on_save": True,
    "save_strategy": "steps",
    "save_steps": 100_000,
}


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    guarded: bool
    options: dict[str, Any]
    stock_options: dict[str, Any]
    stock_is_guarded: bool = False
    callbacks: Callable[[], list[Any]] = list
    size: str = "small"


SIZES = {"small": (64, 2, 32), "large": (192, 4, 64)}
"""Width, layers and tokens of a row. A step of the larger model takes some 50 ms."""

SETTINGS = [
    Setting("stock against stock (control)", False, {}, {}),
    Setting("`DivGuardTrainer`, options off", True, {}, {}),
    Setting("`--divguard_detector adaptive`", True, {"divguard_detector": "adaptive"}, {}),
    Setting(
        "all guards (adaptive with rollback, best-N, evaluation on save)",
        True,
        ALL_GUARDS,
        {"save_strategy": "steps", "save_steps": 100_000},
    ),
]

COMPARED = [
    Setting("stock against stock (control)", False, {}, {}, size="large"),
    Setting(
        "comparison on, `stop`: kept weights",
        True,
        {"divguard_detector": "adaptive", "divguard_action": "stop"},
        {},
        size="large",
    ),
    Setting(
        "comparison on, `rollback`: kept weights and optimizer",
        True,
        {"divguard_detector": "adaptive", "divguard_action": "rollback", "divguard_snapshot_steps": 0},
        {},
        size="large",
    ),
]
"""The comparison of weights, on a larger model; `--compared` measures these."""


class Turns(TrainerCallback):
    """Hands over to the other run after every block, and notes what each block took.

    Args:
        own: Released when it is this run's turn.
        other: Released when this run's turn is over.
    """

    def __init__(self, own: threading.Semaphore, other: threading.Semaphore) -> None:
        self.own, self.other = own, other
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.began: tuple[float, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % BLOCK:
            return
        if self.began is not None:
            self.wall.append(time.perf_counter() - self.began[0])
            self.cpu.append(time.thread_time() - self.began[1])
        self.other.release()
        self.own.acquire()
        self.began = time.perf_counter(), time.thread_time()


def make_trainer(
    guarded: bool, options: dict[str, Any], steps: int, folder: str, callbacks: list[Any], size: str = "small"
) -> Any:
    width, layers, length = SIZES[size]
    common = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "logging_steps": BLOCK,
        "learning_rate": 1e-4,
        "save_strategy": "no",
    }
    arguments = base_arguments(folder, **{**common, **options})
    trainer = (DivGuardTrainer if guarded else Trainer)(
        model=gpt2(vocabulary=64, length=length, width=width, layers=layers, heads=2, dropout=0.1),
        args=(DivGuardTrainingArguments if guarded else TrainingArguments)(**arguments),
        train_dataset=RandomRows(512, length, vocabulary=64),
        eval_dataset=RandomRows(16, length, vocabulary=64),
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def race(setting: Setting, blocks: int, measured_first: bool) -> tuple[float, float]:
    """Let both runs take turns; return the median ratio of a block, of CPU and of wall time."""
    may_run = {measured: threading.Semaphore(0) for measured in (False, True)}
    turns = {measured: Turns(may_run[measured], may_run[not measured]) for measured in (False, True)}
    steps = (WARM_UP_BLOCKS + blocks) * BLOCK + 1
    errors: list[BaseException] = []
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            measured: make_trainer(
                setting.guarded if measured else setting.stock_is_guarded,
                setting.options if measured else setting.stock_options,
                steps,
                os.path.join(folder, str(measured)),
                [turns[measured], *setting.callbacks()],
                setting.size,
            )
            for measured in (measured_first, not measured_first)
        }

        def train(measured: bool) -> None:
            may_run[measured].acquire()
            try:
                trainers[measured].train()
            except BaseException as error:
                errors.append(error)
            finally:
                may_run[not measured].release()

        threads = [threading.Thread(target=train, args=(measured,)) for measured in (False, True)]
        for thread in threads:
            thread.start()
        may_run[measured_first].release()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    note_kept(trainers[True])

    def ratio(kind: str) -> float:
        ours, stock = (getattr(turns[measured], kind)[WARM_UP_BLOCKS:] for measured in (True, False))
        return statistics.median(one / other for one, other in zip(ours, stock, strict=True))

    STOCK_MS.append(statistics.median(turns[False].cpu) / BLOCK * 1e3)
    return ratio("cpu"), ratio("wall")


def note_kept(trainer: Any) -> None:
    """Note how many forward passes looks took in the last race, in how many steps."""
    run = getattr(trainer, "_run", None)
    if run is not None and run.comparison is not None:
        PASSES.append((run.comparison.looks.passes, trainer.state.global_step))


PASSES: list[tuple[int, int]] = []
"""Forward passes of looks, and steps, of each race with comparisons."""

STOCK_MS: list[float] = []
"""CPU milliseconds of a stock step, one entry per race."""


def measure(setting: Setting, repeats: int, blocks: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Return the ratios of several races for one setting, each side first in every other."""
    ratios = [race(setting, blocks, measured_first=bool(number % 2)) for number in range(repeats)]
    cpu, wall = ([ratio[kind] for ratio in ratios] for kind in (0, 1))
    progress(f"{setting.name}: CPU {interval(cpu)}, wall {interval(wall)}")
    return {"name": setting.name, "cpu": cpu, "wall": wall}


def interval(ratios: list[float]) -> str:
    """Return median, and its 95 % interval by resampling with a fixed seed."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} ({medians[50]:.3f} to {medians[-51]:.3f})"


def direct_microseconds(steps: int = 2000) -> tuple[float, float]:
    """Return the CPU microseconds per step of the losses (delivered every ten steps) and of the adaptive rule."""
    losses, rule, loss, norm = StepLosses(BLOCK, 1), AdaptiveRule(), torch.tensor(2.0), torch.tensor(0.5)
    losses.is_collecting = True
    noise = random.Random(0)
    values = [2.0 + noise.gauss(0.0, 0.1) for _ in range(steps)]

    def loss_steps() -> None:
        for step in range(1, steps + 1):
            losses.micro_batches.append(loss.detach().clone())
            losses.close_step(step, norm)
            if step % BLOCK == 0:
                losses.drain(step)

    def rule_steps() -> None:
        rule.reset()
        for step, value in enumerate(values, start=1):
            rule.observe(step, value, 1.0)

    def best_of_five(part: Callable[[], None]) -> float:
        times = []
        for _ in range(5):
            began = time.thread_time()
            part()
            times.append(time.thread_time() - began)
        return min(times) / steps * 1e6

    return best_of_five(loss_steps), best_of_five(rule_steps)


def page(results: list[dict[str, Any]], repeats: int, blocks: int) -> str:
    """Return the page of the documentation."""
    stock_ms = statistics.median(STOCK_MS)
    collecting, rule = direct_microseconds()
    share = (collecting + rule) / stock_ms / 10
    rows = "\n".join(
        f"| {row['name']} | {interval(row['cpu'])} | {interval(row['wall'])} |" for row in results
    )
    return f"""# What guarding costs per step

Time of a training step against the stock Trainer's; 1.000 is no difference. The first row compares the stock Trainer
with itself and shows what is chance.

| setting | CPU time | wall time |
|---|---|---|
{rows}

Two runs take turns in one process, {BLOCK} steps each, so that other load of the machine affects both alike. A
race is {blocks} such turns; its ratio is the median over them. A row is the median of {repeats} races, and in brackets
the interval that holds that median in 95 of 100 resamplings of the races. Saves and evaluations are not in it.

A stock step takes {stock_ms:.1f} ms of CPU time here (a GPT-2 of 0.1 million parameters, batches of 8 rows of 32
tokens, a log every {BLOCK} steps), so 0.01 is {stock_ms * 10:.0f} microseconds. In a loop of their own, collecting the
losses takes {collecting:.0f} microseconds of a step and the adaptive rule {rule:.0f}: {share:.1f} % of this step, less
than the races can distinguish from chance. Larger models have far longer steps, in which the same microseconds
do not show.

Measured with one thread, on a machine shared with other work. {machine()}

How often the CPU waits for the device needs no measurement: `tests/hf/test_losses.py` counts it. It is as often as
the stock Trainer does, and one transfer more for each check of the losses: every `divguard_check_steps` steps, and before
a log, an evaluation or a save.

To repeat it:

```bash
make bench-overhead BENCH="--repeats {repeats} --blocks {blocks} --output docs/overhead.md"
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=12, help="races per setting")
    parser.add_argument("--blocks", type=int, default=20, help="turns of ten steps in each race")
    parser.add_argument("--short", action="store_true", help="two short races each, to see that it runs")
    parser.add_argument(
        "--compared", action="store_true", help="print the cost of comparing, on a larger model"
    )
    parser.add_argument("--output", type=Path, help="write the page here as well")
    options = parser.parse_args()
    repeats, blocks = (2, 4) if options.short else (options.repeats, options.blocks)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("hf_divguard").setLevel(logging.ERROR)
    settings = COMPARED if options.compared else SETTINGS
    race(settings[-1], 1, measured_first=True)  # imports and first calls are in no measurement
    STOCK_MS.clear()
    PASSES.clear()
    results = [
        measure(setting, repeats, blocks, lambda line: print(line, flush=True)) for setting in settings
    ]
    if options.compared:
        passes, steps = (sum(column) for column in zip(*PASSES, strict=True))
        print(f"A stock step takes {statistics.median(STOCK_MS):.1f} ms of CPU time.")
        print(f"Looks took {passes} forward passes in {steps} steps.")
        return
    text = page(results, repeats, blocks)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
