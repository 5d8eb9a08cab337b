"""What the recipes share: a fault that a flag puts into a run, and the lines at the end."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from transformers import HfArgumentParser, TrainerCallback

from hf_divguard import exit_on_divergence

__all__ = ["Fault", "FaultArguments", "parse", "train_and_report"]


@dataclass
class FaultArguments:
    """A fault to show what the guards do. Without one the run is healthy."""

    fault: Literal["none", "learning_rate", "gradient", "weights"] = field(
        default="none",
        metadata={
            "help": "learning_rate: far too high for some steps; gradient, weights: one of the gradients, or of "
            "the weights, becomes NaN."
        },
    )
    fault_step: int = field(default=40, metadata={"help": "The first step of the fault."})
    fault_length: int = field(default=3, metadata={"help": "Steps for which the learning rate is too high."})
    fault_factor: float = field(default=300.0, metadata={"help": "Factor on the learning rate."})


class Fault(TrainerCallback):
    """Puts a fault into a run: ``callbacks=[Fault(arguments)]``.

    Args:
        arguments: Which fault, and when.
    """

    def __init__(self, arguments: FaultArguments) -> None:
        self.arguments = arguments

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Damage the coming step."""
        wanted, step = self.arguments, state.global_step + 1
        if wanted.fault == "learning_rate" and 0 <= step - wanted.fault_step < wanted.fault_length:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= wanted.fault_factor
        if wanted.fault in ("gradient", "weights") and step == wanted.fault_step:
            weight = next(each for each in kwargs["model"].parameters() if each.requires_grad)
            if wanted.fault == "gradient":
                weight.register_hook(
                    lambda gradient: gradient * float("nan") if state.global_step < step else None
                )
            else:
                with torch.no_grad():
                    weight.view(-1)[0] = float("nan")


def parse(*classes: Any) -> tuple[Any, ...]:
    """Return an object of each dataclass, from the flags; the last one holds the training arguments."""
    parsed = HfArgumentParser(classes).parse_args_into_dataclasses()
    logging.basicConfig(level=parsed[-1].get_process_log_level(), format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers.set_seed(parsed[-1].seed)
    if parsed[-1].use_cpu:
        torch.set_num_threads(1)  # the models are so small that threads would only wait for each other
    return tuple(parsed)


def train_and_report(trainer: Any) -> None:
    """Train, and print how the run ended. The exit code is 79 if rollbacks did not help."""
    with exit_on_divergence():
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if not trainer.is_world_process_zero():
        return
    for event in trainer.divguard_events:
        if event["event"] == "rollback":
            print(f"rolled back: step {event['step']} to {event['target_step']}")
        if event["event"] == "update_skipped":
            print(f"update skipped: step {event['step']}")
    ended = "stopped after a finding" if trainer.state.divguard_finding else "finished"
    print(f"{ended}: step {trainer.state.global_step}")
    for checkpoint in trainer.best_checkpoints():
        print(f"best: {checkpoint.path}  {checkpoint.metric_name} {checkpoint.metric:.4f}")
