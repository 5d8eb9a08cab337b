"""Train one model through the same fault with three trainers, and compare the results.

A small language model, made from a config, is trained on the source code of Python's standard
library. In the middle of the run the learning rate is 100 times too high for 15 steps. The same
run is made with ``transformers.Trainer``, with a ``DivGuardTrainer`` that stops, and with a
``DivGuardTrainer`` that rolls back. A run without the fault comes first, as the reference. At
the end a table shows the result of each, and ``demo_output/demo.png`` shows the loss curves.

Run it with ``make demo``, or with ``python examples/demo.py`` if the package is installed with
its extra ``demo``. Nothing is downloaded.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import transformers
from python_corpus import read_texts, small_llama, tokenize_and_pack
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_divguard import (
    DivGuardTrainer,
    DivGuardTrainingArguments,
    DualTimeScaleDivergenceDetector,
    best_checkpoints,
    find_checkpoints,
)

OUTPUT = Path("demo_output")
SEED = 7

# The data.
VOCABULARY = 1024
BLOCK = 64
EVAL_BLOCKS = 64

# The run and the fault.
STEPS = 400
SAVE_EVERY = 40
FAULT_FIRST = 206
FAULT_LAST = 220
FAULT_FACTOR = 100.0


# ---- the fault and the progress line


class TooHighRate(TrainerCallback):
    """The fault: the learning rate is far too high for some steps."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise the learning rate that the schedule has just set."""
        if FAULT_FIRST <= state.global_step + 1 <= FAULT_LAST:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= FAULT_FACTOR


class Progress(TrainerCallback):
    """Records the losses and prints the progress: one line that is updated, or ten lines without a terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.losses: dict[int, float] = {}
        self.eval_losses: dict[int, float] = {}
        self.started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record what is logged, and print the progress."""
        if "eval_loss" in logs:
            self.eval_losses[state.global_step] = logs["eval_loss"]
        if "loss" not in logs:
            return
        self.losses[state.global_step] = logs["loss"]
        on_terminal = sys.stdout.isatty()
        if state.global_step % (5 if on_terminal else STEPS // 10) == 0:
            done = round(20 * state.global_step / STEPS)
            line = (
                f"  {self.label:<27} [{'#' * done}{'.' * (20 - done)}] step {state.global_step:>3}/{STEPS}"
                f"   loss {logs['loss']:6.3f}   {time.monotonic() - self.started:3.0f} s"
            )
            print(line, end="\r" if on_terminal else "\n", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the last progress line on the screen."""
        if sys.stdout.isatty():
            print(flush=True)


# ---- the variants


@dataclass(frozen=True)
class Variant:
    """One way to run the same training."""

    name: str
    label: str
    color: str
    trainer_class: Any
    arguments_class: Any
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[TrainerCallback]] = list
    has_fault: bool = True


GUARDS = {"eval_on_save": True, "preserve_best_model": True, "preserve_n_best": 2}

EVALUATED = {"eval_strategy": "steps", "eval_steps": SAVE_EVERY}

HEALTHY = Variant(
    name="healthy",
    label="stock, without the fault",
    color="#b2babb",
    trainer_class=Trainer,
    arguments_class=TrainingArguments,
    options=EVALUATED,
    has_fault=False,
)

VARIANTS = [
    Variant(
        name="stock",
        label="stock Trainer",
        color="#c0392b",
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
        options=EVALUATED,
    ),
    Variant(
        name="stop",
        label="guarded: ema, stop",
        color="#1f6fb4",
        trainer_class=DivGuardTrainer,
        arguments_class=DivGuardTrainingArguments,
        options=GUARDS,
        callbacks=lambda: [
            DualTimeScaleDivergenceDetector(
                short_alpha=0.3, long_alpha=0.03, threshold=1.0, action="stop", use_eval_loss=False
            )
        ],
    ),
    Variant(
        name="rollback",
        label="guarded: adaptive, rollback",
        color="#1e8449",
        trainer_class=DivGuardTrainer,
        arguments_class=DivGuardTrainingArguments,
        options={**GUARDS, "divguard_detector": "adaptive", "divguard_action": "rollback"},
    ),
]


@dataclass
class Outcome:
    """The result of one variant."""

    variant: Variant
    losses: dict[int, float]
    eval_losses: dict[int, float]
    last_step: int
    finding: Any
    rollbacks: list[dict[str, Any]]
    checkpoints: list[int]
    best: list[tuple[int, float]]


def run(variant: Variant, train_data: Any, eval_data: Any) -> Outcome:
    """Train one variant and list the checkpoints on disk."""
    folder = OUTPUT / variant.name
    args = variant.arguments_class(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        logging_steps=1,
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        seed=SEED,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **variant.options,
    )
    progress = Progress(variant.label)
    trainer = variant.trainer_class(
        model=small_llama(vocabulary=VOCABULARY, block=BLOCK, seed=SEED),
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        callbacks=[*([TooHighRate()] if variant.has_fault else []), progress, *variant.callbacks()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Outcome(
        variant=variant,
        losses=progress.losses,
        eval_losses=progress.eval_losses,
        last_step=trainer.state.global_step,
        finding=getattr(trainer.state, "divguard_finding", None),
        rollbacks=[
            event for event in getattr(trainer, "divguard_events", []) if event["event"] == "rollback"
        ],
        checkpoints=sorted(info.step for info in find_checkpoints(folder)),
        best=[(info.step, info.metric) for info in best_checkpoints(folder, metric="loss")],
    )


# ---- the table


def what_it_did(outcome: Outcome) -> str:
    """Return what a variant did about the fault."""
    if outcome.rollbacks:
        steps = ", ".join(f"{event['step']} to {event['target_step']}" for event in outcome.rollbacks)
        return f"rolled back (step {steps}), then trained to step {outcome.last_step}"
    if outcome.finding is not None:
        return f"found the fault at step {outcome.finding.step}, stopped after step {outcome.last_step}"
    return f"did not notice the fault, trained to step {outcome.last_step}"


def steps_wasted(outcome: Outcome) -> str:
    """Return how many steps of training were wasted."""
    if outcome.rollbacks:
        return f"{sum(event['steps_lost'] for event in outcome.rollbacks)} (undone by the rollback)"
    if outcome.finding is not None:
        return f"{outcome.last_step - outcome.best[0][0]} (since the best checkpoint)"
    return f"{outcome.last_step - FAULT_FIRST + 1} (all since the fault)"


def with_losses(checkpoints: list[int], outcome: Outcome) -> str:
    """Return the checkpoints with their evaluation losses, one per line."""
    return (
        "\n".join(f"step {step:>3}   eval loss {outcome.eval_losses[step]:6.3f}" for step in checkpoints)
        or "none"
    )


def against_healthy(outcome: Outcome, healthy: Outcome) -> str:
    """Return the evaluation loss of the best checkpoint, and its ratio to the healthy run's."""
    step, loss = outcome.best[0]
    reference = healthy.best[0][1]
    return (
        f"step {step:>3}   eval loss {loss:6.3f}\n{loss / reference:.2f} x the healthy run's {reference:.3f}"
    )


def print_table(outcomes: list[Outcome], healthy: Outcome) -> None:
    """Print the results of all variants side by side."""
    rows = [
        ("", [outcome.variant.label for outcome in outcomes]),
        ("what it did", [what_it_did(outcome) for outcome in outcomes]),
        ("steps wasted", [steps_wasted(outcome) for outcome in outcomes]),
        ("checkpoints on disk", [with_losses(outcome.checkpoints, outcome) for outcome in outcomes]),
        ("best checkpoint", [against_healthy(outcome, healthy) for outcome in outcomes]),
    ]
    width = 31
    rule = f"  {'-' * 22}{('  ' + '-' * width) * len(outcomes)}"
    print(rule)
    for title, cells in rows:
        wrapped = [
            [part for line in cell.split("\n") for part in textwrap.wrap(line, width)] for cell in cells
        ]
        for number in range(max(map(len, wrapped))):
            parts = [cell[number] if number < len(cell) else "" for cell in wrapped]
            print(
                f"  {title if number == 0 else '':<22}"
                + "".join(f"  {part:<{width}}" for part in parts).rstrip()
            )
        print(rule)


# ---- the picture


def draw(outcomes: list[Outcome], healthy: Outcome, path: Path) -> None:
    """Draw the losses of all variants, the fault and the findings; below them the checkpoints on disk."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (curves, shelf) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=[4, 0.6 * len(outcomes)], layout="constrained"
    )
    for axes in (curves, shelf):
        axes.axvspan(FAULT_FIRST, FAULT_LAST, color="#f5b041", alpha=0.3, linewidth=0)
    curves.plot(
        list(healthy.losses),
        list(healthy.losses.values()),
        color=healthy.variant.color,
        linewidth=1.3,
        label=healthy.variant.label,
        zorder=1,
    )
    for order, outcome in enumerate(outcomes):
        steps = list(outcome.losses)
        curves.plot(
            steps,
            [outcome.losses[step] for step in steps],
            color=outcome.variant.color,
            linewidth=3.0 if order == 0 else 1.3,
            alpha=0.55 if order == 0 else 1.0,
            label=outcome.variant.label,
            # Runs that ended early are drawn on top.
            zorder=2 if order == 0 else 4 - outcome.last_step / STEPS,
        )
        mark_findings(curves, outcome)
        lay_out_checkpoints(shelf, outcome, row=len(outcomes) - 1 - order)
    curves.set(ylabel="training loss (log scale)", yscale="log")
    curves.set_yticks([4, 5, 6, 8, 10, 12, 15], labels=["4", "5", "6", "8", "10", "12", "15"])
    curves.minorticks_off()
    curves.set_title(
        "The same run with the same fault, three trainers", loc="left", fontsize=12, fontweight="bold", pad=12
    )
    curves.annotate(
        f"the fault: learning rate x{FAULT_FACTOR:g}\nin steps {FAULT_FIRST} to {FAULT_LAST}",
        (FAULT_LAST + 5, 0.97),
        xycoords=("data", "axes fraction"),
        color="#9c640c",
        va="top",
    )
    curves.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 1.0))
    curves.grid(axis="y", color="#e5e7e9")
    shelf.set(xlabel="step", xlim=(0, STEPS + 20), ylim=(-0.6, len(outcomes) - 0.4), yticks=[])
    shelf.set_title("checkpoints on disk, with their evaluation loss", loc="left", fontsize=10)
    shelf.spines["left"].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mark_findings(axes: Any, outcome: Outcome) -> None:
    """Mark where a variant found the fault, and what it did."""
    color = outcome.variant.color
    for event in outcome.rollbacks:
        # The loss of the undone step may not be logged; then the step before it is marked.
        step = max(logged for logged in outcome.losses if logged <= event["step"])
        mark(axes, step, outcome.losses[step], color)
    if outcome.rollbacks:
        places = ", ".join(f"{event['step']} to {event['target_step']}" for event in outcome.rollbacks)
        text = f"rolled back\n(step {places}),\nthen trained on"
        axes.annotate(text, (0.98, 0.155), xycoords="axes fraction", ha="right", color=color)
    if outcome.finding is not None:
        step, value = outcome.finding.step, outcome.losses[outcome.finding.step]
        mark(axes, step, value, color)
        axes.annotate(
            f"found at step {step},\nstopped after step {outcome.last_step}",
            (step, value),
            xytext=(-16, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=color,
            arrowprops={"arrowstyle": "-", "color": color},
        )


def mark(axes: Any, step: int, value: float, color: str) -> None:
    """Draw a ring around one point of a curve."""
    axes.plot(
        step, value, "o", markersize=9, markerfacecolor="none", markeredgewidth=2, color=color, zorder=9
    )


def lay_out_checkpoints(axes: Any, outcome: Outcome, row: int) -> None:
    """Draw the checkpoints of one variant on a line: with their loss if on disk, faint if deleted."""
    color = outcome.variant.color
    deleted = [step for step in outcome.eval_losses if step not in outcome.checkpoints]
    axes.plot([0, outcome.last_step], [row, row], color="#d5d8dc", linewidth=1, zorder=1)
    axes.plot(deleted, [row] * len(deleted), "|", color="#aab7b8", markersize=7)
    axes.annotate(
        outcome.variant.label, (2, row), (0, 5), textcoords="offset points", color=color, fontsize=9
    )
    best = outcome.best[0][0]
    for step in outcome.checkpoints:
        is_best = step == best
        axes.plot(step, row, "s", color=color, markersize=8, markerfacecolor=color if is_best else "white")
        axes.annotate(
            f"{outcome.eval_losses[step]:.2f}" + (" best" if is_best else ""),
            (step, row),
            xytext=(0, 8 if is_best else -8),
            textcoords="offset points",
            ha="center",
            va="bottom" if is_best else "top",
            color=color,
            fontsize=9,
            fontweight="bold" if is_best else "normal",
        )


# ---- main


def main() -> None:
    """Run all variants, print the table and draw the picture."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(("\n" if sys.stdout.isatty() else "") + "  %(message)s"))
    logging.getLogger("hf_divguard").addHandler(handler)
    # One thread, so that a busy machine is not slowed down further and the numbers vary less.
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    texts = read_texts()
    print(f"Text: {len(texts)} files of Python's standard library; training a tokenizer ...", flush=True)
    train_data, eval_data = tokenize_and_pack(
        texts, vocabulary=VOCABULARY, block=BLOCK, eval_blocks=EVAL_BLOCKS, seed=SEED
    )
    weights = small_llama(vocabulary=VOCABULARY, block=BLOCK, seed=SEED).num_parameters()
    print(
        f"Model: {weights:,} parameters; {STEPS} steps on {len(train_data):,} blocks of {BLOCK} tokens.\n"
        f"Fault: in steps {FAULT_FIRST} to {FAULT_LAST} the learning rate is {FAULT_FACTOR:g} times too high.\n",
        flush=True,
    )
    healthy = run(HEALTHY, train_data, eval_data)
    outcomes = [run(variant, train_data, eval_data) for variant in VARIANTS]
    print()
    print_table(outcomes, healthy)
    for outcome in outcomes:
        if outcome.rollbacks:
            print(
                "  For some time after a rollback, older checkpoints stay on disk in case a second rollback needs them."
            )
    draw(outcomes, healthy, OUTPUT / "demo.png")
    print(f"\n  Picture: {OUTPUT / 'demo.png'}   Checkpoints: {OUTPUT}/<variant>/checkpoint-<step>")


if __name__ == "__main__":
    main()
