"""Runs with a rollback, for processes of their own: killed in the middle of it, or on two ranks."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, NonFiniteDetector
from hf_divguard.hf import callbacks
from hf_divguard.storage.failpoints import watch_failpoints
from tests.hf.faults import HighRate, NaNBatch
from tests.processes import kill_at
from tests.tiny import TokenRows, base_arguments, tiny_model

STEPS = 40
FAULT = range(19, 22)

MOMENTS = (
    "rollback decided",
    "weights restored",
    "checkpoint quarantined",
    "save begun",
    "host wrote",
    "checkpoint published",
    "rollback saved",
    "rollback recorded",
    "events written",
)
"""Where a rollback is interrupted: failpoints that follow the decision."""


def weights_hash(model: torch.nn.Module) -> str:
    """Return a digest of all weights."""
    digest = hashlib.sha256()
    for _, weight in model.named_parameters():
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


def make_trainer(folder: str | Path, fault: range = FAULT, **options: Any) -> DivGuardTrainer:
    """Return a trainer whose loss is NaN in three steps; it checks every two and saves every four."""
    common: dict[str, Any] = {"max_steps": STEPS, "save_steps": 4, "logging_steps": 20}
    common |= {"divguard_check_steps": 2, "divguard_cooldown_steps": 6, "divguard_skip_nonfinite": False}
    if "RANK" in os.environ:
        common["ddp_backend"] = "gloo"
    args = DivGuardTrainingArguments(**base_arguments(folder, **{**common, **options}))
    model = tiny_model(dropout=0.1)
    callbacks = [NaNBatch(model, fault), NonFiniteDetector(action="rollback")]
    return DivGuardTrainer(model=model, args=args, train_dataset=TokenRows(), callbacks=callbacks)


def outcome_of(trainer: Any) -> dict[str, Any]:
    """Return how a run ended, without times."""
    events = [
        {key: value for key, value in event.items() if key not in ("time", "seconds", "run_id")}
        for event in trainer.divguard_events
    ]
    return {"events": events, "weights": weights_hash(trainer.model), "step": trainer.state.global_step}


def train_or_resume(rank: int, folder: str, moment: str | None = None) -> dict[str, Any]:
    """Train, or resume what is in ``folder``; be killed at ``moment`` of the first rollback."""
    trainer = make_trainer(folder)
    with kill_at(moment, after="rollback decided"):
        trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))
    return outcome_of(trainer)


def roll_back_on_ranks(rank: int, folder: str) -> dict[str, Any]:
    """Run each case of a rollback on this rank and return how it ended."""
    root, cases = Path(folder), {}
    for name, options in {
        "disk": {},
        "memory": {"divguard_snapshot_steps": 4},
        "accumulation": {"gradient_accumulation_steps": 2},
    }.items():
        trainer = make_trainer(root / name, **options)
        trainer.train()
        cases[name] = outcome_of(trainer)
    bad = make_trainer(root / "one bad rank", FAULT if rank == 1 else range(0))
    bad.train()
    cases["one bad rank"] = outcome_of(bad)
    cases["unreadable memory"] = roll_back_with_unreadable_memory(rank, root / "unreadable memory")
    cases["rate"] = roll_back_a_high_rate(root / "rate")
    resumed = make_trainer(root / "disk")
    resumed.train(resume_from_checkpoint=str(root / "disk" / "checkpoint-28"))
    cases["resumed"] = outcome_of(resumed)
    return cases


def roll_back_with_unreadable_memory(rank: int, folder: Path) -> dict[str, Any]:
    """Roll back where rank 1 cannot read what the detectors knew; return the memory of the detector, too."""
    trainer, real = make_trainer(folder), callbacks.read_sidecar
    detector = next(
        each for each in trainer.callback_handler.callbacks if isinstance(each, NonFiniteDetector)
    )

    def unreadable(checkpoint: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(checkpoint))

    def fail(moment: str) -> None:
        if moment == "weights restored":
            callbacks.read_sidecar = real
        elif moment == "rollback decided" and rank == 1:
            callbacks.read_sidecar = unreadable

    with watch_failpoints(fail):
        trainer.train()
    return {**outcome_of(trainer), "memory": detector.rule.state_dict()}


def roll_back_a_high_rate(folder: Path) -> dict[str, Any]:
    """Train through steps with far too high a learning rate; return losses from before it and of the end, too."""
    args = DivGuardTrainingArguments(
        **base_arguments(
            folder,
            max_steps=110,
            save_steps=10,
            learning_rate=3e-3,
            ddp_backend="gloo",
            divguard_detector="adaptive",
            divguard_action="rollback",
        )
    )
    trainer = DivGuardTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=TokenRows(rows=64),
        callbacks=[HighRate(range(61, 66))],
    )
    trainer.train()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {**outcome_of(trainer), "loss_before": losses[60], "loss_at_the_end": losses[110]}


def compare_on_ranks(rank: int, folder: str) -> dict[str, Any]:
    """Train with noise on the weights of all ranks, with a scripted finding, and on two ranks unguarded."""
    from transformers import Trainer, TrainingArguments

    from hf_divguard import DivergenceDetector
    from tests.hf.faults import ScriptedRule, Stream
    from tests.hf.test_comparison import COMMON, GUARDED, Noise

    root, cases = Path(folder), {}
    options = {**COMMON, "ddp_backend": "gloo"}
    rows = options.pop("train_dataset")

    def run(name: str, callbacks: list[Any], data: Any = rows, eval_rows: Any = None, **more: Any) -> Any:
        trainer_class, arguments_class = (Trainer, TrainingArguments)
        if more:
            trainer_class, arguments_class = DivGuardTrainer, DivGuardTrainingArguments
        args = arguments_class(**base_arguments(root / name, **{**options, **more}))
        model = tiny_model(dropout=0.1)
        trainer = trainer_class(
            model=model, args=args, train_dataset=data, eval_dataset=eval_rows, callbacks=callbacks
        )
        trainer.train()
        return trainer

    # Rank 1 has rows that rank 0 has not: each reads its own half of a batch.
    noise = Stream([step % 8 for step in range(60)], batch=8, wrong=range(40, 61))
    arbiter = {"divguard_eval_arbiter": True, "divguard_action": "rollback", "max_steps": 60}
    steady = {"learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    asked_for = run("arbiter", [], noise, TokenRows(rows=64), **{**GUARDED, **arbiter, **steady})
    cases["arbiter"] = outcome_of(asked_for)
    passes = Stream([step % 4 for step in range(80)], batch=16, wrong=range(40, 55))
    passing = {**GUARDED, **steady, "divguard_action": "rollback", "max_steps": 80}
    cases["labels"] = outcome_of(run("labels", [], passes, per_device_train_batch_size=8, **passing))
    cases["noise"] = outcome_of(run("noise", [Noise(28)], **GUARDED, divguard_action="rollback"))
    stopped = run("stopped", [Noise(28)], **GUARDED, divguard_action="stop")
    cases["stopped"] = {**outcome_of(stopped), "cause": stopped.state.divguard_finding.cause}
    asked = DivergenceDetector(ScriptedRule({20: 18}), action="rollback")
    looked = run("looked into", [asked], **GUARDED)
    cases["looked into"] = {**outcome_of(looked), "passes": looked._run.comparison.looks.passes}
    cases["stock"] = {"weights": weights_hash(run("stock", []).model)}
    return cases
