"""Runs with a fault on one rank of two, for ``test_nan_ranks`` under torchrun; writes how each of them ended."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, NonFiniteDetector
from tests.tiny import TokenRows, base_arguments, checkpoint_steps, tiny_model

FAULT_STEP = 13


class RaggedRows(Dataset):
    """Rows with labels of unequal number, so that the ranks have unequal shares of the tokens."""

    def __init__(self, rows: int) -> None:
        self.rows = TokenRows(rows=rows).rows
        self.lengths = torch.randint(1, 8, (rows,), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.rows[index].clone()
        labels[0] = -100
        labels[1 + int(self.lengths[index]) :] = -100
        return {"input_ids": self.rows[index], "labels": labels}


class NoteTimes(transformers.TrainerCallback):
    """Notes the step and the time at which a rank leaves its loop."""

    left_at = 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left_at = time.time()


class OneBadRank(DivGuardTrainer):
    """Makes the loss, or a gradient, of rank 1 NaN at one step."""

    makes_nan = "loss"
    fault_at: float | None = None

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 0 and self.makes_nan == "gradient":
            next(model.parameters()).register_hook(self.put_nan)
        return super().training_step(model, *args, **kwargs)

    def put_nan(self, value: torch.Tensor) -> torch.Tensor:
        if self.state.global_step + 1 != FAULT_STEP or self.args.process_index != 1:
            return value
        self.fault_at = time.time()
        return value * math.nan

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return self.put_nan(loss) if self.makes_nan == "loss" and self.model.training else loss


def run_with_a_fault(output_dir: Path, makes_nan: str, detector: str, action: str) -> dict[str, Any]:
    options = {"max_steps": 60, "logging_steps": 100, "save_steps": 5, "eval_strategy": "no"}
    trainer = OneBadRank(
        model=tiny_model(),
        args=DivGuardTrainingArguments(
            **base_arguments(output_dir, ddp_backend="gloo", **options),
            divguard_detector=detector,
            divguard_skip_nonfinite=False,
            divguard_action=action,
        ),
        train_dataset=TokenRows(),
        callbacks=[times := NoteTimes()],
    )
    trainer.makes_nan = makes_nan
    trainer.train()
    dist.barrier()
    found = getattr(trainer.state, "divguard_finding", None)
    return {
        "step": trainer.state.global_step,
        "found_step": found.step if found else None,
        "found_metric": found.metric if found else None,
        "fault_at": trainer.fault_at,
        "left_at": times.left_at,
        "checkpoints": sorted(checkpoint_steps(output_dir)),
    }


class Recorder(NonFiniteDetector):
    """Keeps the losses that it gets."""

    def __init__(self) -> None:
        super().__init__(action="warn")
        self.losses: list[float] = []

    def on_raw_losses(self, values: list[Any], *args: Any) -> None:
        self.losses += [entry.loss for entry in values]
        super().on_raw_losses(values, *args)


class ByHand(DivGuardTrainer):
    """Adds up the losses of the tokens of each micro-batch of this rank itself."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            logs = torch.log_softmax(self.model(input_ids=inputs["input_ids"]).logits[:, :-1], -1)
            labels = inputs["labels"][:, 1:]
            known = labels != -100
            losses = -logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        step = self.state.global_step
        while len(self.by_step) <= step:
            self.by_step.append([])
        self.by_step[step].append((float(losses[known].double().sum()), int(known.sum())))
        return super().training_step(model, inputs, *args, **kwargs)


def run_by_hand(output_dir: Path, average_tokens: bool) -> dict[str, Any]:
    recorder = Recorder()
    arguments = base_arguments(
        output_dir,
        ddp_backend="gloo",
        save_strategy="no",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=3,
        logging_steps=4,
        average_tokens_across_devices=average_tokens,
    )
    trainer = ByHand(
        model=tiny_model(),
        args=DivGuardTrainingArguments(**arguments),
        train_dataset=RaggedRows(30),
        callbacks=[recorder],
    )
    trainer.by_step = []
    trainer.train()
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, trainer.by_step)
    by_hand = []
    for of_ranks in zip(*shares, strict=True):
        totals = [(sum(loss for loss, _ in batches), sum(n for _, n in batches)) for batches in of_ranks]
        if average_tokens:
            by_hand.append(sum(total for total, _ in totals) / sum(n for _, n in totals))
        else:
            by_hand.append(sum(total / n for total, n in totals) / len(totals))
    return {"seen": recorder.losses, "by_hand": by_hand}


def results(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for makes_nan, detector, action in (
        ("loss", "nonfinite", "stop"),
        ("loss", "adaptive", "abort"),
        ("gradient", "adaptive", "stop"),
        ("gradient", "nonfinite", "abort"),
    ):
        name = f"{makes_nan} {action}"
        yield name, run_with_a_fault(folder / name, makes_nan, detector, action)
    for average in (True, False):
        yield f"by hand {average}", run_by_hand(folder / "by hand", average)


def main() -> None:
    folder = Path(sys.argv[1])
    transformers.logging.set_verbosity_error()
    found = dict(results(folder))
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    gc.collect()  # models hold the process group; its threads may abort the process if they outlive the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
