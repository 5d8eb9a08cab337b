"""Runs under an engine, as they go on each rank: rolled back, healthy, given up, resumed, killed."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, NonFiniteDetector
from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.host import Host
from tests.hf.engines.launch import allow_fsdp_on_cpu, fsdp_options
from tests.hf.engines.sharded_models import sharded_llama
from tests.hf.engines.zero import (
    STATES,
    float32_parts,
    held_by_zero,
    is_zero,
    prepare_zero_on_cpu,
    zero_options,
)
from tests.hf.faults import NaNBatch, same_state
from tests.tiny import TokenRows, base_arguments, tiny_model

Options = dict[str, Any]

FAULT = range(11, 13)
AT_WORK = {
    "ddp": "one process",
    "fsdp2": "FSDP2",
    "fsdp2-full": "FSDP2",
    "fsdp1": "FSDP1",
    "distributed-config": "FSDP2 by `DistributedConfig`",
    "launched-fsdp2": "FSDP2",
    "launched-zero2": "DeepSpeed",
    **{f"zero{stage}": "DeepSpeed" for stage in (1, 2, 3)},
}
"""How the name of the engine begins that has to be at work."""


def options_of(engine: str) -> Options:
    """Return the arguments that make a run train under an engine; this process is made ready for it."""
    if engine in ("ddp", "distributed-config"):
        return {}
    if engine == "launched-zero2":
        prepare_zero_on_cpu()
        return {}  # `accelerate launch` has said the rest
    if engine.startswith("zero"):
        return zero_options(int(engine.removeprefix("zero")))
    allow_fsdp_on_cpu()
    if engine == "launched-fsdp2":
        return {}
    kinds: dict[str, Options] = {
        "fsdp2": fsdp_options(),
        "fsdp2-full": fsdp_options(state_dict="FULL_STATE_DICT"),
        "fsdp1": fsdp_options(version=1, sync_module_states=False),
    }
    return kinds[engine]


def new_model(engine: str, folder: str | Path) -> Any:
    """Return a model that is the same at every call."""
    return sharded_llama(folder) if engine == "distributed-config" else tiny_model(dropout=0.1)


# ---- what a rank holds


def local(value: Any) -> Any:
    """Return a copy of a nested state with the part of each tensor that this rank holds."""
    if isinstance(value, torch.Tensor):
        part = value.detach()
        return (part.to_local() if hasattr(part, "to_local") else part).clone()
    if isinstance(value, dict):
        return {key: local(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [local(entry) for entry in value]
    return value


def held(trainer: Any) -> dict[str, Any]:
    """Return this rank's weights and optimizer state, without the learning rates, which go on."""
    if is_zero(trainer):
        return held_by_zero(trainer)
    return {
        "weights": local(dict(trainer.model.named_parameters())),
        "optimizer": local(trainer.optimizer.state_dict()["state"]),
    }


def digest(trainer: Any) -> str:
    """Return a digest of what this rank holds of the weights."""
    found = hashlib.sha256()
    for weight in held(trainer)["weights"].values():
        found.update(weight.float().numpy().tobytes())
    return found.hexdigest()


def live_parts(trainer: Any) -> list[torch.Tensor]:
    """Return this rank's parts of the weights; writing into them changes the model, under DeepSpeed after an update."""
    if is_zero(trainer):
        return float32_parts(trainer)
    weights = [weight.detach() for weight in trainer.model.parameters()]
    return [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]


class Held(TrainerCallback):
    """Notes what this rank holds at the end of each step, before the guards act, and when a rollback is logged."""

    trainer: Any = None

    def __init__(self) -> None:
        self.at: dict[int, Any] = {}
        self.restored: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it at the end of a step."""
        self.at[state.global_step] = held(self.trainer)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note it if this is the log of a rollback."""
        if "divguard/rollbacks" in (logs or {}):
            self.restored.append(copy.deepcopy(held(self.trainer)))


# ---- runs


def make_trainer(
    engine: str,
    folder: str | Path,
    *,
    callbacks: tuple[Any, ...] = (),
    fault: range = range(0),
    is_guarded: bool = True,
    model: Any = None,
    adapter: bool = False,
    fsdp_config: Options | None = None,
    at_work: str | None = "",
    **options: Any,
) -> Any:
    """Return a trainer under an engine, whose loss is NaN in the steps of ``fault``.

    Args:
        engine: What it trains under.
        folder: The run folder.
        callbacks: More callbacks, which get the trainer as an attribute.
        fault: Steps.
        is_guarded: Whether it is ours or the stock one.
        model: The model, instead of a new one.
        adapter: Whether only an adapter is trained.
        fsdp_config: More of ``fsdp_config``.
        at_work: How the name of the engine begins that has to be at work, where it is not as always; ``None`` for any.
        **options: More arguments of the run.
    """
    common: Options = {"max_steps": 16, "save_steps": 4, "logging_steps": 16}
    if "RANK" in os.environ and "zero" not in engine:
        common["ddp_backend"] = "gloo"  # under DeepSpeed it would be DistributedDataParallel
    guards: Options = {
        "divguard_check_steps": 1,
        "divguard_cooldown_steps": 2,
        "divguard_skip_nonfinite": False,
    }
    common |= {**options_of(engine), **(guards if is_guarded else {}), **options}
    if fsdp_config is not None:
        common["fsdp_config"] |= fsdp_config
    args = (DivGuardTrainingArguments if is_guarded else TrainingArguments)(
        **base_arguments(folder, **common)
    )
    model = model if model is not None else new_model(engine, folder)
    if adapter:
        model = with_adapter(model)
    watching: list[Any] = [NaNBatch(model, fault)] if fault else []
    if is_guarded and "divguard_detector" not in options:
        watching.append(NonFiniteDetector(action="rollback"))
    trainer = (DivGuardTrainer if is_guarded else Trainer)(
        model=model,
        args=args,
        train_dataset=TokenRows(),
        eval_dataset=TokenRows(rows=8, seed=1),
        callbacks=[*watching, *callbacks],
    )
    if at_work is not None:
        name = engine_of(Host(trainer)).name
        assert name.startswith(at_work or AT_WORK[engine]), f"{name} is at work, not {AT_WORK[engine]}"
    for callback in callbacks:
        callback.trainer = trainer
    return trainer


def with_adapter(model: Any) -> Any:
    """Return the model with a low-rank adapter, which alone is trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    is_gpt2 = model.config.model_type == "gpt2"
    where: Options = {"target_modules": ["c_attn"] if is_gpt2 else ["q_proj"], "fan_in_fan_out": is_gpt2}
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **where))


def without_times(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return events of a run as two runs can share them."""
    return [{k: v for k, v in event.items() if k not in ("time", "seconds", "run_id")} for event in events]


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


def losses(trainer: Any) -> list[float]:
    """Return the logged losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


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
