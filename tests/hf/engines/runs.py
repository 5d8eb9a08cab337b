"""Runs under an engine, as they go on each rank: rolled back, healthy, given up, resumed, killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.host import Host
from tests.hf.engines.trainers import (
    Held,
    Options,
    digest,
    held,
    live_parts,
    losses,
    make_trainer,
    without_times,
)
from tests.hf.engines.zero import STATES
from tests.hf.faults import same_state

FAULT = range(11, 13)


def roll_back(engine: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Train through a NaN; return what was done, and whether all came back to the bit on this rank."""
    seen = Held()
    trainer = make_trainer(engine, folder, callbacks=(seen,), fault=FAULT, **options)
    trainer.train()
    events = without_times(trainer.divguard_events)
    targets = [event["target_step"] for event in events if event["event"] == "rollback"]
    return {
        "events": events,
        "same": [same_state(now, seen.at[step]) for now, step in zip(seen.restored, targets, strict=True)],
        "moved": not same_state(seen.at[targets[0]]["weights"], seen.at[FAULT[0] - 1]["weights"]),
        "finite": all(bool(torch.isfinite(w).all()) for w in held(trainer)["weights"].values()),
        "step": trainer.state.global_step,
    }


def from_disk_and_memory(rank: int, folder: str, engine: str, **options: Any) -> dict[str, Any]:
    """Roll back from a checkpoint and from a state in memory."""
    disk = roll_back(engine, Path(folder, "disk"), **options)
    return {
        "disk": disk,
        "memory": roll_back(engine, Path(folder, "memory"), divguard_snapshot_steps=4, **options),
    }


# ---- healthy, damaged, given up


class Noise(TrainerCallback):
    """Noise on this rank's part of the weights, before the forward pass of a step."""

    trainer: Any = None

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add it."""
        if state.global_step + 1 == self.step:
            lot = torch.Generator().manual_seed(args.process_index)
            with torch.no_grad():
                for part in live_parts(self.trainer):
                    part += 2.0 * torch.randn(part.shape, generator=lot)


GUARDS: Options = {
    "divguard_detector": "adaptive",
    "divguard_action": "rollback",
    "eval_on_save": True,
    "preserve_best_model": True,
}


def healthy(rank: int, folder: str, engine: str, **options: Any) -> dict[str, Any]:
    """Train without a fault: stock, and with every guard, which looks into what a detector asks for."""
    from hf_divguard import DivergenceDetector
    from tests.hf.faults import ScriptedRule

    common: Options = {
        "max_steps": 30,
        "save_steps": 10,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        **options,
    }
    # An evaluation draws a random number for its data loader, whoever asks for it.
    evaluates: Options = {"eval_strategy": "steps", "eval_steps": 10}
    if engine == "distributed-config":
        evaluates["save_only_model"] = True  # the host refuses to save the optimizer
    stock = make_trainer(engine, Path(folder, "stock"), is_guarded=False, **common, **evaluates)
    stock.train()
    asks = DivergenceDetector(ScriptedRule({22: 20, 25: 23}), action="rollback")
    common |= {**GUARDS, "divguard_skip_nonfinite": True}
    guarded = make_trainer(engine, Path(folder, "guarded"), callbacks=(asks,), **common)
    guarded.train()
    return {
        "same": digest(stock) == digest(guarded) and losses(stock) == losses(guarded),
        "events": without_times(guarded.divguard_events),
        "passes": guarded._run.comparison.looks.passes,
        "best": [Path(each.path).name for each in guarded.best_checkpoints()],
    }


def compare(rank: int, folder: str, engine: str, **options: Any) -> dict[str, Any]:
    """Train with noise on the weights: the comparison of weights finds the cause and has it undone."""
    common: Options = {
        "max_steps": 40,
        "save_steps": 10,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        **options,
    }
    seen = Held()
    trainer = make_trainer(engine, folder, callbacks=(Noise(28), seen), **common, **GUARDS)
    trainer.train()
    events = without_times(trainer.divguard_events)
    targets = [event["target_step"] for event in events if event["event"] == "rollback"]
    return {
        "events": events,
        "same": [same_state(now, seen.at[step]) for now, step in zip(seen.restored, targets, strict=True)],
        "causes": [event["finding"].get("cause") for event in events if event["event"] == "rollback"],
        "losses": losses(trainer),
    }


def give_up(rank: int, folder: str, engine: str, **options: Any) -> dict[str, Any]:
    """Train with a NaN that does not end; return what the model holds then."""
    from hf_divguard import TrainingDivergedError

    seen = Held()
    common: Options = {
        "divguard_max_rollbacks": 1,
        "eval_on_save": True,
        "preserve_best_model": True,
        **options,
    }
    trainer = make_trainer(engine, folder, callbacks=(seen,), fault=range(11, 100), **common)
    error = ""
    try:
        trainer.train()
    except TrainingDivergedError as caught:
        error = str(caught)
    event = trainer.divguard_events[-1]
    step = int(Path(event["checkpoint"]).name.rpartition("-")[2]) if event.get("checkpoint") else None
    return {
        "error": error.replace(folder, ""),
        "checkpoint": step,
        "same": step is not None and same_state(held(trainer)["weights"], seen.at[step]["weights"]),
    }


def skip(rank: int, folder: str, engine: str, **options: Any) -> dict[str, Any]:
    """Train through a NaN whose update is left out."""
    trainer = make_trainer(engine, folder, fault=FAULT, divguard_skip_nonfinite=True, **options)
    trainer.train()
    return {
        "events": without_times(trainer.divguard_events),
        "finite": all(bool(torch.isfinite(w).all()) for w in held(trainer)["weights"].values()),
    }


def resume(rank: int, folder: str, engine: str, **options: Any) -> dict[str, Any]:
    """Train to the end, and once more from the checkpoint in the middle; compare what the rank holds."""
    whole = make_trainer(engine, folder, **options)
    whole.train()
    resumed = make_trainer(engine, folder, **options)
    resumed.train(resume_from_checkpoint=str(Path(folder, "checkpoint-8")))
    return {"same": same_state(held(whole), held(resumed)), "step": resumed.state.global_step}


def divided(rank: int, folder: str, engine: str) -> dict[str, Any]:
    """Start a run whose sequences are divided over the ranks; return the error."""
    from accelerate import ParallelismConfig

    sizes = {"sp_size": 2, "sp_backend": "deepspeed"} if engine.startswith("zero") else {"cp_size": 2}
    trainer = make_trainer(
        engine, folder, at_work=None, parallelism_config=ParallelismConfig(**sizes), max_steps=1
    )
    error = ""
    try:
        trainer.train()
    except ValueError as caught:
        error = str(caught)
    return {"error": error, "step": trainer.state.global_step}


def unreadable(rank: int, folder: str, engine: str, bad_rank: int = 1, **options: Any) -> dict[str, Any]:
    """Roll back while one rank cannot read the newest checkpoint: the bytes of its part are others."""

    class Spoil(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank != bad_rank or state.global_step != 8:
                return
            for pattern in (f"__{bad_rank}_*.distcp", STATES.format(rank=bad_rank)):
                for path in Path(folder, "checkpoint-8").rglob(pattern):
                    path.write_bytes(b"\0" * path.stat().st_size)

    seen = Held()
    trainer = make_trainer(engine, folder, callbacks=(Spoil(), seen), fault=FAULT, **options)
    trainer.train()
    events = without_times(trainer.divguard_events)
    targets = [event["target_step"] for event in events if event["event"] == "rollback"]
    return {
        "targets": targets,
        "same": [same_state(now, seen.at[step]) for now, step in zip(seen.restored, targets, strict=True)],
    }


def write_after_evaluation(rank: int, folder: str, engine: str, **options: Any) -> dict[str, Any]:
    """Put states back right after a forward pass, which may leave parameters gathered: the next one must see them."""
    seen: dict[str, Any] = {}

    class Evaluate(TrainerCallback):
        trainer: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engine = engine_of(Host(self.trainer))
            if state.global_step == 8:
                seen["kept"], seen["loss"] = engine.keep(), self.evaluate()
            elif state.global_step == 12:
                self.evaluate()
                engine.put_back(seen["kept"])
                seen["from memory"] = self.evaluate()
                engine.read(str(Path(folder, "checkpoint-4")))()
                seen["from disk"] = self.evaluate()
            elif state.global_step == 4:
                seen["loss of 4"] = self.evaluate()

        def evaluate(self) -> float:
            rows = self.trainer.eval_dataset
            inputs = self.trainer.data_collator([rows[index] for index in range(4)])
            model = self.trainer.model.eval()
            with torch.no_grad():
                loss = float(model(**inputs).loss)
            model.train()
            return loss

    trainer = make_trainer(engine, folder, callbacks=(Evaluate(),), max_steps=12, **options)
    trainer.train()
    return {
        "memory": [seen["from memory"], seen["loss"]],
        "disk": [seen["from disk"], seen["loss of 4"]],
    }


def several(rank: int, folder: str, engine: str, what: dict[str, Options]) -> dict[str, Any]:
    """Run functions of this module one after the other, each with a folder of its own; return what they return.

    Args:
        rank: This rank.
        folder: Gets a folder for each.
        engine: What the runs train under.
        what: The options of each, by the name of the function, or that and a slash and more.
    """
    functions: dict[str, Callable[..., Any]] = {
        "from_disk_and_memory": from_disk_and_memory,
        "healthy": healthy,
        "compare": compare,
        "give_up": give_up,
        "skip": skip,
        "resume": resume,
        "unreadable": unreadable,
        "write_after_evaluation": write_after_evaluation,
    }
    return {
        name: functions[name.partition("/")[0]](
            rank, str(Path(folder, name.replace("/", "-"))), engine, **options
        )
        for name, options in what.items()
    }
