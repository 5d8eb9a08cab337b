"""Runs on two ranks of which one fails or dies around a save: what the processes of ``test_failing_ranks.py`` do."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from hf_divguard import CheckpointSaveError, DivGuardTrainer
from hf_divguard.hf import ranks
from tests.hf import scenarios
from tests.processes import kill_self


class Fails(TrainerCallback):
    """Raises, or dies, in an event of step 4 on rank 1."""

    def __init__(self, event: str, rank: int, how: str) -> None:
        self._rank, self._how = rank, how
        setattr(self, event, self._fail)

    def _fail(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4 and args.process_index == self._rank:
            fail(self._how)


def fail(how: str) -> None:
    if how == "dies":
        kill_self()
    raise ValueError("a callback has failed")


class FailsInSave(DivGuardTrainer):
    """Fails on one rank in the host's save; ``meets``: the host's save has an exchange after that."""

    meets = False
    slow_seconds = 0.0
    fails_on = 1
    how = "raises"

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.state.global_step == 4:
            if self.args.process_index == self.fails_on:
                fail(self.how)
            time.sleep(self.slow_seconds)
            if self.meets:
                dist.barrier()
        super()._save_optimizer_and_scheduler(output_dir)


def in_callback(
    rank: int, output_dir: str, event: str, on_rank: int = 1, how: str = "raises", **options: Any
) -> dict[str, Any]:
    trainer = scenarios.trainer_of(output_dir, callbacks=[Fails(event, on_rank, how)], **options)
    trainer.train()
    return scenarios.report(trainer)


class Asks(TrainerCallback):
    """Sets a switch of the control in an event of step 3, on rank 0 alone."""

    def __init__(self, event: str, switch: str) -> None:
        self._switch = switch
        setattr(self, event, self._ask)

    def _ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and args.process_index == 0:
            setattr(control, self._switch, True)


def asking(rank: int, output_dir: str, event: str, switch: str, **options: Any) -> dict[str, Any]:
    """Train with a callback that asks for something on rank 0; on rank 1 it is not even there."""
    callbacks = [Asks(event, switch)] if rank == 0 else []
    trainer = scenarios.trainer_of(output_dir, callbacks=callbacks, logging_steps=1, **options)
    trainer.train()
    return scenarios.report(trainer)


def in_save(
    rank: int,
    output_dir: str,
    meets: bool = False,
    slow_seconds: float = 0.0,
    on_rank: int = 1,
    how: str = "raises",
    **options: Any,
) -> dict[str, Any]:
    trainer = scenarios.trainer_of(output_dir, **options)
    trainer.__class__ = FailsInSave
    trainer.meets, trainer.slow_seconds = meets, slow_seconds
    trainer.fails_on, trainer.how = on_rank, how
    trainer.train()
    return scenarios.report(trainer)


def without_its_metric(rank: int, output_dir: str) -> None:
    """Evaluate for a ranking metric that no rank produces."""
    options = {"preserve_best_model": True, "best_model_metric": "accuracy"}
    names = ["score"]  # not known from the source, so that it is found at the evaluation
    trainer = scenarios.trainer_of(
        output_dir, compute_metrics=lambda prediction: dict.fromkeys(names, 1.0), **options
    )
    trainer.train()


def slow_rank(rank: int, output_dir: str, seconds: float) -> dict[str, Any]:
    """Save; rank 1 takes longer for its part of it than the others may wait for a rank with an error."""
    return in_save(rank, output_dir, slow_seconds=seconds if rank == 1 else 0.0, on_rank=-1, max_steps=4)


def start_again(rank: int) -> list[int]:
    """End with an error on both ranks; then exchange something as a new start of them, with the store of the first."""
    dist.init_process_group("gloo")
    error = ValueError("the first start has failed") if rank == 1 else None
    try:
        ranks.Ranks(rank, 2).raise_if_any_failed(error, "Saving", ends_run=True)
    except CheckpointSaveError:
        return importlib.reload(ranks).Ranks(rank, 2).gather(rank)
    raise AssertionError("the first start has not failed")
