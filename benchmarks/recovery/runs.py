"""One training of a cell: by the stock Trainer, as the oracle, or guarded. Uses the public interface alone."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.recovery.cells import STEPS, Cell, Plan, plan_of
from benchmarks.recovery.data import Pool
from benchmarks.recovery.faults import Batch, BatchFault, FaultCallback
from benchmarks.recovery.models import Task, fresh_model
from benchmarks.recovery.objectives import ObjectiveCallback
from benchmarks.recovery.oracle import SkipUpdates, skipped_by_oracle
from benchmarks.recovery.outcome import said

UNGUARDED = ("stock", "oracle")
GUARDED = ("rollback", "stop")
VARIANTS = (*UNGUARDED, *GUARDED)
SAVE_EVERY = 20
EVAL_ROWS = 768
EVAL_SEED = 10_000
ARBITER_ROWS = 256
LOG_EVERY = 10


class Indices(Dataset):  # type: ignore[type-arg]
    """Rows that are only a number; the collator fetches what the schedule has there."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"index": index}


@lru_cache(maxsize=24)
def pool_of(task_name: str, make: Any, domain: str, count: int, seed: int) -> Pool:
    """Return the rows of a domain."""
    return make(domain, count, seed)  # type: ignore[no-any-return]


def rows_of(task: Task, shares: dict[str, float], indices: list[int], count: int, seed: int) -> Batch:
    """Return the rows with these numbers, each of a domain that its number draws by the shares."""
    groups: dict[str, list[int]] = {}
    for index in indices:
        drawn, total = (index * 0.6180339887) % 1.0, 0.0
        for domain, share in shares.items():
            total += share
            if drawn < total or total >= 1.0 - 1e-9:
                groups.setdefault(domain, []).append(index)
                break
    parts = [
        {name: value[chosen] for name, value in pool_of(task.name, task.pool, domain, count, seed).items()}
        for domain, chosen in groups.items()
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Collator:
    """Makes the batches: the n-th call is the n-th micro-batch of the run.

    Args:
        plan: What is trained.
        spoil: A fault in the batches.
    """

    def __init__(self, plan: Plan, spoil: BatchFault | None) -> None:
        self.plan, self.spoil, self.calls = plan, spoil, 0

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Return the next micro-batch, or a batch of evaluation rows."""
        if "index" not in rows[0]:
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        plan, step = self.plan, self.calls // self.plan.accumulation + 1
        self.calls += 1
        shares = plan.schedule(step / STEPS, step)
        batch = rows_of(plan.task, shares, [row["index"] for row in rows], plan.rows, plan.seed)
        return batch if self.spoil is None else self.spoil(batch, step)


class Losses(TrainerCallback):
    """Keeps the losses that a run logs."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss of a log."""
        if "loss" in logs:
            self.logged.append((state.global_step, logs["loss"]))


class EvaluationRows(Dataset):  # type: ignore[type-arg]
    """Rows like those with which a run ends, but others than those that it is judged by."""

    def __init__(self, plan: Plan) -> None:
        shares = plan.schedule(1.0, STEPS)
        self.rows = rows_of(plan.task, shares, list(range(ARBITER_ROWS)), ARBITER_ROWS, EVAL_SEED + 1)

    def __len__(self) -> int:
        return ARBITER_ROWS

    def __getitem__(self, index: int) -> Batch:
        return {name: value[index] for name, value in self.rows.items()}


def common_arguments(plan: Plan, output: str) -> dict[str, Any]:
    """Return the arguments that all variants have."""
    return {
        "output_dir": output,
        "max_steps": STEPS,
        "per_device_train_batch_size": plan.batch,
        "warmup_steps": 10,
        "logging_steps": LOG_EVERY,
        "save_steps": SAVE_EVERY,
        "seed": plan.seed,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        **plan.args,
    }


def make_trainer(cell: Cell, variant: str, output: str, options: dict[str, Any]) -> tuple[Any, Losses]:
    """Return the trainer of a variant, with the fault hooked in, and what keeps its losses."""
    plan = plan_of(cell)
    model = fresh_model(plan.task, plan.seed)
    losses = Losses()
    callbacks: list[TrainerCallback] = [losses]
    if plan.objective is not None:
        callbacks.append(ObjectiveCallback(plan.objective, model))
    spoil = None
    if cell.fault is not None and variant == "oracle":
        callbacks.append(SkipUpdates(skipped_by_oracle(cell.fault, cell.bad_steps)))
    elif cell.fault is not None and cell.fault.place == "batch":
        spoil = BatchFault(cell.fault, cell.bad_steps, plan.task)
    elif cell.fault is not None:
        callbacks.append(FaultCallback(cell.fault, cell.bad_steps, model))
    common = common_arguments(plan, output)
    if variant in UNGUARDED:
        trainer_class: Any = Trainer
        args: Any = TrainingArguments(**{**common, "save_strategy": "no"})
    else:
        from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments

        trainer_class = DivGuardTrainer
        guard = {"divguard_detector": "adaptive", "divguard_action": variant, **options}
        args = DivGuardTrainingArguments(**{**common, **guard})
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=Indices(plan.rows),
        eval_dataset=EvaluationRows(plan) if options.get("divguard_eval_arbiter") else None,
        data_collator=Collator(plan, spoil),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, losses


def final_loss(cell: Cell, model: Any) -> float:
    """Return the loss on held-out rows of the data with which the run ends, the same for all variants."""
    plan = plan_of(cell)
    shares = plan.schedule(1.0, STEPS)
    model.eval()
    losses = []
    with torch.no_grad():
        for indices in torch.arange(EVAL_ROWS).split(256):
            batch = rows_of(plan.task, shares, indices.tolist(), EVAL_ROWS, EVAL_SEED)
            losses.append(float(model(**batch).loss))
    return sum(losses) / len(losses)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return a digest of all weights and buffers, to compare them bit by bit."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def run(cell: Cell, variant: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train a cell in a variant and return how it ended."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("hf_divguard").setLevel(logging.CRITICAL)  # the report says it
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        trainer, losses = make_trainer(cell, variant, folder, options or {})
        began, gave_up, error = time.perf_counter(), "", ""
        try:
            trainer.train()
        except Exception as raised:
            if type(raised).__name__ == "TrainingDivergedError":
                gave_up = str(raised)
            elif variant in UNGUARDED:
                raise
            else:  # the report shows it; the other cells go on
                error = f"{type(raised).__name__}: {raised}"
        seconds = time.perf_counter() - began
        for hooks in (module._forward_hooks for module in trainer.model.modules()):
            hooks.clear()
        outcome = {
            "final": final_loss(cell, trainer.model),
            "last_step": trainer.state.global_step,
            "weights": digest(trainer.model.state_dict().values()),
            "seconds": round(seconds, 3),
            "losses": [[step, round(loss, 5)] for step, loss in losses.logged],
        }
        if variant in GUARDED:
            outcome |= {"gave_up": gave_up, "error": error, **said(trainer)}
        return outcome
