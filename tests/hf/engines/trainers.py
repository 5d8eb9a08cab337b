"""Trainers under an engine, and what a rank of them holds."""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, NonFiniteDetector
from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.host import Host
from tests.hf.engines.launch import allow_fsdp_on_cpu, fsdp_options
from tests.hf.engines.sharded_models import sharded_llama
from tests.hf.engines.zero import float32_parts, held_by_zero, is_zero, prepare_zero_on_cpu, zero_options
from tests.hf.faults import NaNBatch
from tests.tiny import TokenRows, base_arguments, tiny_model

Options = dict[str, Any]

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


def losses(trainer: Any) -> list[float]:
    """Return the logged losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
