"""With every option off, and with the stock arguments, a run is the stock run to the last byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_divguard import (
    DivGuardTrainer,
    DivGuardTrainingArguments,
    DualWindowDivergenceDetector,
    verify_checkpoint,
)
from tests.conftest import Recorder
from tests.tiny import same_weights, weights

pytestmark = pytest.mark.filterwarnings("ignore:mtime may not be reliable")

CLOCK = ("runtime", "per_second")
"""Endings of the only logged numbers that depend on how fast the machine is."""

OPTIONS = {
    "max_steps": 10,
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "logging_steps": 2,
    "dropout": 0.1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a limit": {"save_total_limit": 2},
    "the best loaded": {"save_total_limit": 1, "load_best_model_at_end": True},
    "gradient accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "epochs": {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "max_steps": 16,
    },
}
OURS = {
    "our arguments": DivGuardTrainingArguments,
    "stock arguments": TrainingArguments,
}


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: "nan_filtered" if isinstance(key, str) and key.endswith(CLOCK) else without_clock(entry)
            for key, entry in value.items()
        }
    return [without_clock(entry) for entry in value] if isinstance(value, list) else value


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def state_text(checkpoint: Path, folder: Path) -> str:
    """Return ``trainer_state.json`` as it stands, with the clock masked and the run folder given one name."""
    text = (checkpoint / "trainer_state.json").read_text()
    data = json.loads(text)
    assert json.dumps(data, indent=2, sort_keys=True) + "\n" == text, "masking must not change the spelling"
    return json.dumps(without_clock(data), indent=2, sort_keys=True).replace(str(folder), "RUN")


@pytest.fixture
def train(make_trainer: Any, tmp_path: Path) -> Any:
    def train(
        name: str, cls: Any, args: Any, resume: Any = None, **options: Any
    ) -> tuple[Any, Recorder, Any]:
        recorder = Recorder()
        callbacks = [recorder, *options.pop("callbacks", [])]
        trainer = make_trainer(
            tmp_path / name,
            trainer_class=cls,
            arguments_class=args,
            callbacks=callbacks,
            **{**OPTIONS, **options},
        )
        output = trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder, output

    return train


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("arguments", OURS.values(), ids=OURS)
def test_files_states_weights_and_logs_are_those_of_the_stock_trainer(
    train: Any, tmp_path: Path, variant: dict[str, Any], arguments: Any
) -> None:
    stock, stock_record, stock_output = train("stock", Trainer, TrainingArguments, **variant)
    ours, our_record, our_output = train("ours", DivGuardTrainer, arguments, **variant)

    assert files(tmp_path / "ours") == files(tmp_path / "stock")
    checkpoints = sorted((tmp_path / "stock").glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        twin = tmp_path / "ours" / checkpoint.name
        assert state_text(twin, tmp_path / "ours") == state_text(checkpoint, tmp_path / "stock")
        first, second = load_file(checkpoint / "model.safetensors"), load_file(twin / "model.safetensors")
        assert same_weights(first, second)
    assert same_weights(weights(stock.model), weights(ours.model))
    assert our_record.events == stock_record.events
    assert without_clock(our_record.logs) == without_clock(stock_record.logs)
    assert without_clock(our_output.metrics) == without_clock(stock_output.metrics)


class Counts(TrainerCallback):
    """A callback of somebody else that has a state."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


GUARDED: dict[str, dict[str, Any]] = {
    "a detector": {"callbacks": [DualWindowDivergenceDetector(use_eval_loss=False)]},
    "a stateful callback": {"callbacks": [Counts()]},
    "safe saves": {"divguard_save_mode": "staged"},
    "safe saves in place": {"divguard_save_mode": "in_place"},
    "the adaptive detector": {"divguard_detector": "adaptive", "divguard_action": "warn"},
    "best checkpoints": {"preserve_best_model": True},
    "evaluation on save, where saves were evaluated": {
        "eval_on_save": True,
        "save_strategy": "steps",
        "save_steps": 3,
    },
}


@pytest.mark.parametrize("options", GUARDED.values(), ids=GUARDED)
def test_guards_add_their_two_files_and_change_nothing_else(
    train: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    extra = {"load_best_model_at_end": True, "max_steps": 9}
    stock, stock_record, _ = train("stock", Trainer, TrainingArguments, **extra)
    ours, our_record, _ = train("ours", DivGuardTrainer, DivGuardTrainingArguments, **extra, **options)
    added = files(tmp_path / "ours") - files(tmp_path / "stock")
    in_checkpoints = {Path(name).name for name in added if Path(name).parts[0] != "divguard"}
    assert in_checkpoints == {"divguard_state.json", "divguard_manifest.json"}
    assert files(tmp_path / "stock") <= files(tmp_path / "ours")
    for checkpoint in (tmp_path / "stock").glob("checkpoint-*"):
        twin = tmp_path / "ours" / checkpoint.name
        assert state_text(twin, tmp_path / "ours") == state_text(checkpoint, tmp_path / "stock")
    assert same_weights(weights(stock.model), weights(ours.model))
    assert our_record.events == stock_record.events
    assert without_clock(our_record.logs) == without_clock(stock_record.logs)


RESUMES = {
    "the stock trainer from our checkpoints": (DivGuardTrainer, Trainer),
    "ours from stock checkpoints": (Trainer, DivGuardTrainer),
    "ours from ours": (DivGuardTrainer, DivGuardTrainer),
}
CLASSES = {Trainer: TrainingArguments, DivGuardTrainer: DivGuardTrainingArguments}


@pytest.mark.parametrize(("first", "second"), RESUMES.values(), ids=RESUMES)
def test_each_trainer_resumes_from_the_other_to_the_same_weights(
    train: Any, tmp_path: Path, first: Any, second: Any
) -> None:
    guards = {
        Trainer: {},
        DivGuardTrainer: {
            "preserve_best_model": True,
            "eval_on_save": True,
            "divguard_save_mode": "staged",
            "callbacks": [Counts()],
        },
    }
    whole, _, _ = train("whole", Trainer, TrainingArguments)
    train("cut", first, CLASSES[first], **guards[first])
    for step in (9, 10):  # what is left is a run that was cut at 6
        folder = tmp_path / "cut" / f"checkpoint-{step}"
        assert folder.is_dir()
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    resumed, record, _ = train("cut", second, CLASSES[second], resume=True, **guards[second])
    assert min(record.steps("log")) > 6
    assert same_weights(weights(whole.model), weights(resumed.model))
    if second is DivGuardTrainer:
        assert {entry.step for entry in resumed.best_checkpoints(9)} == {3, 6, 9, 10}
        assert verify_checkpoint(tmp_path / "cut" / "checkpoint-9").status == "complete"
