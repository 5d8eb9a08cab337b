"""The oracle: the same run without the fault, less exactly the updates that the fault made bad, and nothing else.

A fault in a batch, a loss, a gradient or a learning rate makes the updates of its steps bad: the oracle does not
make them. It reads the batches, steps the schedule and counts the steps as every run does. A fault in the state
(weights or optimizer) makes no update bad: the oracle is then the run without it.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from benchmarks.recovery.faults import Fault


def skipped_by_oracle(fault: Fault, steps: list[int]) -> list[int]:
    """Return the updates that the oracle leaves out."""
    return [] if fault.place == "state" else list(steps)


class SkipUpdates(TrainerCallback):
    """Leaves out the updates of some steps: optimizers pass over parameters without a gradient.

    Args:
        steps: The optimizer steps, counted from 1.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = frozenset(steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradients of a step that is left out."""
        if state.global_step + 1 in self.steps:
            for weight in kwargs["model"].parameters():
                weight.grad = None
