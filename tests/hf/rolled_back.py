"""What the tests of rollbacks have other processes do: on two ranks under torchrun, or until they are killed.

``python -m tests.hf.rolled_back FOLDER [MOMENT]`` trains through a fault; ``MOMENT`` names where in the rollback the
process kills itself. Without one it resumes what is in the folder, or starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, NonFiniteDetector
from hf_divguard.hf import reports
from hf_divguard.hf import rollback as rollback_module
from hf_divguard.hf.checkpoint_writer import CheckpointWriter
from tests.conftest import TokenRows, base_arguments, tiny_model
from tests.hf.faults import HighRate, NaNBatch

STEPS = 40
FAULT = range(19, 22)


def weights_hash(model: torch.nn.Module) -> str:
    """Return a digest of all weights."""
    digest = hashlib.sha256()
    for _, weight in model.named_parameters():
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()


def make_trainer(folder: Path, fault: range = FAULT, **options: Any) -> DivGuardTrainer:
    """Return a trainer whose loss is NaN in three steps; it looks every two and saves every four."""
    common: dict[str, Any] = {"max_steps": STEPS, "save_steps": 4, "logging_steps": 20}
    common |= {"divguard_check_steps": 2, "divguard_cooldown_steps": 6}
    args = DivGuardTrainingArguments(**base_arguments(folder, **{**common, **options}))
    model = tiny_model(dropout=0.1)
    callbacks = [NaNBatch(model, fault), NonFiniteDetector(action="rollback")]
    return DivGuardTrainer(model=model, args=args, train_dataset=TokenRows(), callbacks=callbacks)


def told(trainer: Any) -> dict[str, Any]:
    """Return what came of a run, without times."""
    events = [
        {key: value for key, value in event.items() if key not in ("time", "seconds", "run_id")}
        for event in trainer.divguard_events
    ]
    return {"events": events, "weights": weights_hash(trainer.model), "step": trainer.state.global_step}


# ---- killed in the middle of it


def die() -> None:
    """Be killed, now."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function: Callable[..., Any], *, before: bool = False, call: int = 1) -> Callable[..., Any]:
    """Return ``function`` with a kill before or after its call number ``call``."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == call:
            die()
        result = function(*args, **kwargs)
        if not before and calls == call:
            die()
        return result

    return wrapped


def after_rollback(function: Callable[..., Any], kill: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` until the first rollback is done, then ``kill``."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (kill if STATE["rolled_back"] else function)(self, *args, **kwargs)

    return wrapped


STATE = {"rolled_back": False}


def note_rollbacks() -> None:
    """Know from the line that is told whether a rollback is done."""
    tell = reports.RollbackJournal.report_rollback

    def telling(*args: Any, **kwargs: Any) -> None:
        STATE["rolled_back"] = True
        tell(*args, **kwargs)

    reports.RollbackJournal.report_rollback = telling  # type: ignore[method-assign]


def arm(moment: str) -> None:
    """Have the process killed at ``moment`` of its first rollback."""
    note_rollbacks()
    story = reports.RollbackJournal
    if moment == "before_quarantine":
        rollback_module.quarantine = dying(rollback_module.quarantine, before=True)
    elif moment == "after_quarantine":
        rollback_module.quarantine = dying(rollback_module.quarantine)
    elif moment == "after_restore":
        rollback_module.restore_checkpoint = dying(rollback_module.restore_checkpoint)
    elif moment == "before_save":
        save = CheckpointWriter.save
        CheckpointWriter.save = after_rollback(save, lambda *a, **k: die())  # type: ignore[method-assign]
    elif moment == "in_save":
        seal = CheckpointWriter._seal
        CheckpointWriter._seal = after_rollback(seal, lambda *a, **k: die())  # type: ignore[method-assign]
    elif moment == "after_save":
        save = CheckpointWriter.save
        CheckpointWriter.save = after_rollback(save, dying(save))  # type: ignore[method-assign]
    elif moment == "after_story":
        story.write = after_rollback(story.write, dying(story.write))  # type: ignore[method-assign]
    else:
        raise ValueError(moment)


MOMENTS = (
    "before_quarantine",
    "after_quarantine",
    "after_restore",
    "before_save",
    "in_save",
    "after_save",
    "after_story",
)


def train_or_resume(folder: Path, moment: str | None) -> None:
    """Train; write down what came of it if the process lives to see it."""
    if moment is not None:
        arm(moment)
    trainer = make_trainer(folder / "out")
    trainer.train(resume_from_checkpoint=any((folder / "out").glob("checkpoint-*")))
    (folder / "told.json").write_text(json.dumps(told(trainer)))


# ---- on two ranks


def mend_resume_of_old_transformers() -> None:
    """Let 4.57 load an optimizer on more than one CPU process: it asks for the device "cpu:0", which is none."""
    load = torch.load

    def load_to_cpu(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("map_location", "")).startswith("cpu"):
            kwargs["map_location"] = "cpu"
        return load(*args, **kwargs)

    torch.load = load_to_cpu


def on_ranks(folder: Path) -> None:
    """Run each case on this rank, and write down what came of it."""
    cases: dict[str, Any] = {}
    for name, options in {"disk": {}, "memory": {"divguard_snapshot_steps": 4}, "accumulation": {}}.items():
        extra = {"gradient_accumulation_steps": 2} if name == "accumulation" else {}
        trainer = make_trainer(folder / name, **options, **extra)
        trainer.train()
        cases[name] = told(trainer)
    bad = make_trainer(folder / "one bad rank", FAULT if os.environ["RANK"] == "1" else range(0))
    bad.train()
    cases["one bad rank"] = told(bad)
    adaptive = DivGuardTrainingArguments(
        **base_arguments(
            folder / "rate",
            max_steps=110,
            save_steps=10,
            learning_rate=3e-3,
            divguard_detector="adaptive",
            divguard_action="rollback",
        )
    )
    high = DivGuardTrainer(
        model=tiny_model(),
        args=adaptive,
        train_dataset=TokenRows(rows=64),
        callbacks=[HighRate(range(61, 66))],
    )
    high.train()
    losses = {entry["step"]: entry["loss"] for entry in high.state.log_history if "loss" in entry}
    cases["rate"] = {**told(high), "loss_before": losses[60], "loss_at_the_end": losses[110]}
    mend_resume_of_old_transformers()
    resumed = make_trainer(folder / "disk", max_steps=STEPS)
    resumed.train(resume_from_checkpoint=str(folder / "disk" / "checkpoint-28"))
    cases["resumed"] = told(resumed)
    rank = os.environ["RANK"]
    (folder / f"rank{rank}.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    if "RANK" in os.environ:
        on_ranks(where)
    else:
        train_or_resume(where, sys.argv[2] if len(sys.argv) > 2 else None)
