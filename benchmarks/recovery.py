"""Put faults into runs and compare how they end: healthy, stock, stopped, rolled back.

Three kinds of models learn for some hundred steps; half-way one of eight faults strikes. Each run is done four
times with the same seed: without the fault (by the stock Trainer), with it by the stock Trainer, with it by a
``DivGuardTrainer`` that stops, and with it by one that rolls back. The guards are at their defaults: the adaptive
detector gets no hint of where the fault is. What counts is the loss of the final model on a held-out set, over
that of the healthy run. A healthy run under the guard is compared with the stock one bit by bit.

    python benchmarks/recovery.py             # all of it, half an hour; writes docs/recovery
    python benchmarks/recovery.py --short     # for continuous integration
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
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
from recovery_tasks import (
    EVAL_ROWS,
    FAULTS,
    FINAL_EVAL_ROWS,
    TASKS,
    Fault,
    FaultCallback,
    Rows,
    Stream,
    Task,
    fresh_model,
)
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, TrainingDivergedError

STEPS = 1000
SAVE_EVERY = 20
FAULT_AT = 511
VARIANTS = ("stock", "stop", "rollback")
TRANSIENT_AIM = 1.05
INTRO = (
    "# How runs end after a fault\n\n"
    "Final evaluation loss over that of the same run without the fault. Written by `make bench-recovery`; "
    "[rollback.md](../rollback.md) tells what it means.\n\n"
)


class Losses(TrainerCallback):
    """Keeps the losses of a run."""

    def __init__(self) -> None:
        self.train: list[tuple[int, float]] = []
        self.eval: list[tuple[int, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep what is logged."""
        if "eval_loss" in logs:
            self.eval.append((state.global_step, logs["eval_loss"]))
        elif "loss" in logs:
            self.train.append((state.global_step, logs["loss"]))


class Bench:
    """Runs one task with one seed.

    Args:
        task: The task.
        seed: Seed of data order, weights and dropout.
        steps: Length of a run.
        folder: Gets checkpoints; emptied after each run.
    """

    def __init__(self, task: Task, seed: int, steps: int, folder: Path) -> None:
        self.task, self.seed, self.steps, self.folder = task, seed, steps, folder
        rows = task.rows(seed)
        if len(rows) < steps * task.batch + EVAL_ROWS + FINAL_EVAL_ROWS:
            raise ValueError(f"{task.name} has {len(rows)} rows, too few for {steps} steps")
        self.final_eval = Rows(rows[:FINAL_EVAL_ROWS])
        self.eval = Rows(rows[FINAL_EVAL_ROWS : FINAL_EVAL_ROWS + EVAL_ROWS])
        self.train = rows[FINAL_EVAL_ROWS + EVAL_ROWS :][: steps * task.batch]

    def run(self, variant: str, fault: Fault | None, *, clips: bool = True) -> dict[str, Any]:
        """Train and return how it ended."""
        task = self.task
        at = range(0) if fault is None else fault.steps(FAULT_AT, self.steps)
        model = fresh_model(task, self.seed)
        output = self.folder / "run"
        shutil.rmtree(output, ignore_errors=True)
        common = {
            "output_dir": str(output),
            "max_steps": self.steps,
            "per_device_train_batch_size": task.batch,
            "per_device_eval_batch_size": 64,
            "learning_rate": task.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 30,
            "max_grad_norm": 1.0 if clips else 0.0,
            "logging_steps": 10,
            "eval_strategy": "steps",
            "eval_steps": SAVE_EVERY,
            "save_steps": SAVE_EVERY,
            "seed": self.seed,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        if variant == "stock":
            trainer_class: Any = Trainer
            args: Any = TrainingArguments(**{**common, "save_strategy": "no"})
        else:
            trainer_class = DivGuardTrainer
            args = DivGuardTrainingArguments(
                **common,
                preserve_best_model=True,
                divguard_detector="adaptive",
                divguard_action="rollback" if variant == "rollback" else "stop",
            )
        losses = Losses()
        callbacks: list[TrainerCallback] = [losses]
        if fault is not None and not fault.data:
            callbacks.append(FaultCallback(fault, at, model))
        bad_data = at if fault is not None and fault.data else range(0)
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=Stream(self.train, task.batch, task.classes, bad_data),
            eval_dataset=self.eval,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        gave_up = ""
        began = time.perf_counter()
        try:
            trainer.train()
        except TrainingDivergedError as error:
            gave_up = str(error)
        seconds = time.perf_counter() - began
        events = getattr(trainer, "divguard_events", [])
        finding = getattr(trainer.state, "divguard_finding", None)
        last_step = trainer.state.global_step
        best = best_before(losses.eval, fault)
        final = trainer.evaluate(self.final_eval)["eval_loss"]
        return {
            "variant": variant,
            "final": final,
            "last_step": last_step,
            "found": events[0]["finding"]["step"] if events else getattr(finding, "step", None),
            "kind": events[0]["finding"]["kind"] if events else getattr(finding, "kind", None),
            "rollbacks": [
                [event["step"], event["target_step"]] for event in events if event["event"] == "rollback"
            ],
            "steps_lost": sum(event["steps_lost"] for event in events if event["event"] == "rollback"),
            "gave_up": gave_up,
            "held": next((event["checkpoint"] for event in events if event["event"] == "gave_up"), None),
            "best_before": best,
            "seconds": seconds,
            "train_losses": losses.train,
            "weights": [weight.detach().clone() for weight in model.parameters()],
        }


def best_before(eval_losses: list[tuple[int, float]], fault: Fault | None) -> int | None:
    """Return the step before the fault whose checkpoint was evaluated best."""
    before = [(loss, step) for step, loss in eval_losses if fault is not None and step < FAULT_AT]
    return min(before)[1] if before else None


def cell(bench: Bench, fault: Fault, healthy: dict[bool, dict[str, Any]]) -> dict[str, Any]:
    """Run one fault in all variants; return a row of the table."""
    reference = healthy[fault.clips]["final"]
    row: dict[str, Any] = {"task": bench.task.name, "fault": fault.name, "seed": bench.seed}
    row["healthy"] = reference
    row["curves"] = {"healthy": healthy[fault.clips]["train_losses"]}
    for variant in VARIANTS:
        outcome = bench.run(variant, fault, clips=fault.clips)
        outcome.pop("weights")
        row["curves"][variant] = outcome.pop("train_losses")
        row[variant] = {**outcome, "ratio": outcome["final"] / reference}
    return row


def healthy_runs(bench: Bench, faults: list[Fault]) -> tuple[dict[bool, dict[str, Any]], dict[str, Any]]:
    """Run without a fault, stock and guarded; return the stock ones by clipping, and how the guarded one compares."""
    stock = {
        clips: bench.run("stock", None, clips=clips)
        for clips in sorted({fault.clips for fault in faults} | {True})
    }
    guarded = bench.run("rollback", None)
    same = all(map(torch.equal, stock[True]["weights"], guarded["weights"]))
    comparison = {
        "task": bench.task.name,
        "seed": bench.seed,
        "final": guarded["final"],
        "rollbacks": len(guarded["rollbacks"]),
        "same_weights": same,
    }
    return stock, comparison


# ---- what is told


def number(ratio: float) -> str:
    """Return a ratio for the table."""
    return "nan" if ratio != ratio else f"{ratio:.3f}" if ratio < 10 else f"{ratio:.0f}"


def what_it_did(outcome: dict[str, Any]) -> str:
    """Return in a few words what the rolled-back run did."""
    if not outcome["rollbacks"] and not outcome["gave_up"]:
        return "nothing to do"
    moves = ", ".join(f"{step} to {target}" for step, target in outcome["rollbacks"])
    if not outcome["gave_up"]:
        return moves
    held = Path(outcome["held"]).name if outcome["held"] else "nothing"
    return f"{moves}; gave up at {outcome['last_step']}, holds {held}"


def table(rows: list[dict[str, Any]], healthy: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    tasks = {task.name: task for task in TASKS}
    faults = {fault.name: fault for fault in FAULTS}
    lines = [
        "| model | fault | seed | healthy loss | stock | stop | rollback | rolled back (from step to step) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stop = row["stop"]
        stopped = number(stop["ratio"]) + (f" (at {stop['last_step']})" if stop["found"] else "")
        lines.append(
            f"| {tasks[row['task']].title} | {faults[row['fault']].title} | {row['seed']} | {row['healthy']:.4f} | "
            f"{number(row['stock']['ratio'])} | {stopped} | **{number(row['rollback']['ratio'])}** | "
            f"{what_it_did(row['rollback'])} |"
        )
    lines += ["", *summary(rows, healthy)]
    return "\n".join(lines) + "\n"


def judged(rows: list[dict[str, Any]], *, permanent: bool) -> list[dict[str, Any]]:
    """Return the rows of permanent or of transient faults."""
    kinds = {fault.name for fault in FAULTS if fault.is_permanent == permanent}
    return [row for row in rows if row["fault"] in kinds]


def summary(rows: list[dict[str, Any]], healthy: list[dict[str, Any]]) -> list[str]:
    """Return what the table says, as a list in Markdown."""
    transient, permanent = judged(rows, permanent=False), judged(rows, permanent=True)
    lines = []
    if transient:
        for variant in VARIANTS:
            ratios = [row[variant]["ratio"] for row in transient]
            finite = [ratio for ratio in ratios if ratio == ratio]
            beyond = sum(not ratio <= TRANSIENT_AIM for ratio in ratios)
            lines.append(
                f"- Transient faults, {variant}: median {number(statistics.median(sorted(finite)))} of the healthy loss, "
                f"worst {'nan' if len(finite) < len(ratios) else number(max(finite))}; {beyond} of {len(ratios)} above "
                f"{TRANSIENT_AIM}."
            )
    if permanent:
        right = sum(is_right_end(row["rollback"]) for row in permanent)
        lines.append(
            f"- Permanent faults: {right} of {len(permanent)} gave up after exactly the 3 rollbacks allowed, with the "
            "best checkpoint from before the fault in the model."
        )
    rollbacks = sum(entry["rollbacks"] for entry in healthy)
    same = sum(entry["same_weights"] for entry in healthy)
    lines.append(
        f"- Healthy runs under the guard: {rollbacks} rollbacks in {len(healthy)}; in {same} of {len(healthy)} the final "
        "weights are those of the stock Trainer to the last bit."
    )
    return lines


def is_right_end(outcome: dict[str, Any]) -> bool:
    """Return whether a run with a permanent fault ended as it should."""
    held = outcome["held"] or ""
    right = held.endswith(f"checkpoint-{outcome['best_before']}")
    return bool(outcome["gave_up"]) and len(outcome["rollbacks"]) == 3 and right


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the training losses around the fault, for all runs of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    tasks = [task for task in TASKS if any(row["task"] == task.name for row in rows)]
    faults = [fault for fault in FAULTS if any(row["fault"] == fault.name for row in rows)]
    figure, grid = plt.subplots(
        len(faults),
        len(tasks),
        figsize=(4.2 * len(tasks), 1.75 * len(faults) + 0.8),
        sharex=True,
        sharey="col",
        squeeze=False,
        layout="constrained",
    )
    styles = {
        "healthy": ("#b2babb", 3.0, "without the fault"),
        "stock": ("#c0392b", 1.2, "stock"),
        "stop": ("#1f6fb4", 1.2, "stop (its end: a dot)"),
        "rollback": ("#1e8449", 1.2, "rollback (each: a triangle)"),
    }
    for right, task in enumerate(tasks):
        for down, fault in enumerate(faults):
            axes = grid[down, right]
            row = next((r for r in rows if r["task"] == task.name and r["fault"] == fault.name), None)
            if row is None:
                axes.set_axis_off()
                continue
            covered = fault.steps(FAULT_AT, STEPS)
            axes.axvspan(
                covered[0], max(covered[-1], covered[0] + 2), color="#f5b041", alpha=0.3, linewidth=0
            )
            for name, (color, width, label) in styles.items():
                # The host logs 0.0 where its filter has hidden a NaN; a logarithm has no place for it.
                steps, losses = zip(*row["curves"][name], strict=True)
                losses = [loss if loss > 0.0 else float("nan") for loss in losses]
                axes.plot(steps, losses, color=color, linewidth=width, label=label)
                if name == "stop" and row["stop"]["found"]:
                    axes.plot(steps[-1], losses[-1], "o", color=color, markersize=4)
            for step, _ in row["rollback"]["rollbacks"]:
                axes.plot(step, 0.04, "^", color=styles["rollback"][0], transform=axes.get_xaxis_transform())
            ends = {name: row[name]["ratio"] for name in VARIANTS}
            how = "gave up with" if row["rollback"]["gave_up"] else "rolled back"
            title = f"end: stock {number(ends['stock'])}, {how} {number(ends['rollback'])}"
            above = [f"{task.title}: training loss"] if down == 0 else []
            axes.set_title(
                "\n".join([*above, *([] if right else [fault.title]), title]), loc="left", fontsize=8.5
            )
            axes.set_yscale("log")
            axes.grid(axis="y", color="#e5e7e9")
            if down == len(faults) - 1:
                axes.set_xlabel("step")
        healthy = [
            loss for row in rows if row["task"] == task.name for step, loss in row["curves"]["healthy"]
        ]
        axes = grid[0, right]
        axes.set_xlim(400, STEPS + 10)
        axes.set_ylim(0.8 * min(healthy), 12.0 * statistics.median(healthy))
        ticks = [
            tick
            for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
            if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]
        ]
        for axes in grid[:, right]:
            axes.set_yticks(ticks)
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def conditions(seconds: float, seeds: list[int], steps: int) -> str:
    """Return with what the figures were made."""
    return (
        f"{steps} steps, fault from step {FAULT_AT} on, a checkpoint every {SAVE_EVERY} steps, cosine schedule, seeds "
        f"{', '.join(map(str, seeds))}; all options of the guard at their defaults, detector `adaptive`. "
        f"{platform.machine()} with {os.cpu_count()} cores ({platform.system()}), one thread, Python "
        f"{platform.python_version()}, PyTorch {torch.__version__}, Transformers {transformers.__version__}; "
        f"{seconds / 60:.0f} minutes in all.\n"
    )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--short", action="store_true", help="one model, two faults; fails if they are not healed"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds per model and fault")
    parser.add_argument("--tasks", nargs="*", default=[task.name for task in TASKS])
    parser.add_argument("--faults", nargs="*", default=[fault.name for fault in FAULTS])
    parser.add_argument(
        "--output", type=Path, help="folder for table.md and picture.png (default: docs/recovery)"
    )
    options = parser.parse_args()
    tasks = [task for task in TASKS if task.name in options.tasks]
    faults = [fault for fault in FAULTS if fault.name in options.faults]
    if options.short:
        tasks, faults = [TASKS[2]], [FAULTS[0], FAULTS[7]]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_divguard").setLevel(logging.CRITICAL)  # the table tells it
    transformers.logging.disable_progress_bar()
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    healthy: list[dict[str, Any]] = []
    seeds = list(range(1, (1 if options.short else options.seeds) + 1))
    for task in tasks:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(task, seed, STEPS, Path(folder))
                references, comparison = healthy_runs(bench, faults)
                healthy.append(comparison)
                print(f"{task.name} seed {seed} healthy: {comparison}", flush=True)
                for fault in faults:
                    rows.append(cell(bench, fault, references))
                    row = rows[-1]
                    print(
                        f"{task.name} seed {seed} {fault.name}: "
                        + ", ".join(f"{name} {number(row[name]['ratio'])}" for name in VARIANTS)
                        + f"; found {row['rollback']['found']} ({row['rollback']['kind']}); "
                        + what_it_did(row["rollback"])
                        + f"; {sum(row[name]['seconds'] for name in VARIANTS):.0f} s",
                        flush=True,
                    )
    text = INTRO + table(rows, healthy) + "\n" + conditions(time.perf_counter() - began, seeds, STEPS)
    print("\n" + text)
    output = options.output or (None if options.short else Path(__file__).parents[1] / "docs" / "recovery")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "table.md").write_text(text, encoding="utf-8")
        (output / "results.json").write_text(json.dumps({"rows": rows, "healthy": healthy}), encoding="utf-8")
        draw(rows, output / "picture.png")
    if options.short:
        healed = all(row["rollback"]["ratio"] <= TRANSIENT_AIM for row in judged(rows, permanent=False))
        ended = all(is_right_end(row["rollback"]) for row in judged(rows, permanent=True))
        same = all(entry["same_weights"] and not entry["rollbacks"] for entry in healthy)
        return 0 if healed and ended and same else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
