"""A tiny model made from a config, tiny data, and a factory of real Trainers on CPU."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

torch.set_num_threads(1)

VOCABULARY = 16
LENGTH = 8


class TokenRows(Dataset):
    """Rows of token ids that a language model can learn: each row counts upwards."""

    def __init__(self, rows: int = 32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
        self.rows = (starts + torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def tiny_model(seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    """Return a language model of some thousand parameters."""
    set_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=8,
            n_layer=1,
            n_head=1,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def base_arguments(output_dir: Any, **options: Any) -> dict[str, Any]:
    """Return arguments for a short, quiet run on CPU."""
    return {
        "output_dir": str(output_dir),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }


def checkpoint_steps(output_dir: str | Path) -> set[int]:
    """Return the steps of the checkpoint folders on disk."""
    return {int(path.name.split("-")[1]) for path in Path(output_dir).glob("checkpoint-*")}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of parameters are equal to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """Return a factory of trainers: ``make_trainer(save_steps=2, ...)``; options go to the arguments."""
    from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments

    def make(
        output_dir: Any = None,
        *,
        trainer_class: Any = DivGuardTrainer,
        arguments_class: Any = DivGuardTrainingArguments,
        callbacks: Any = None,
        compute_metrics: Any = None,
        model: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = "default",
        dropout: float = 0.0,
        **options: Any,
    ) -> Any:
        args = arguments_class(**base_arguments(output_dir or tmp_path / "out", **options))
        return trainer_class(
            model=model if model is not None else tiny_model(dropout=dropout),
            args=args,
            train_dataset=train_dataset if train_dataset is not None else TokenRows(),
            eval_dataset=TokenRows(rows=8, seed=1) if eval_dataset == "default" else eval_dataset,
            callbacks=callbacks,
            compute_metrics=compute_metrics,
        )

    return make


class ScriptedMetric:
    """A ``compute_metrics`` that returns the next value of a list at each evaluation."""

    def __init__(self, values: list[float], name: str = "score") -> None:
        self.values = list(values)
        self.name = name
        self.calls = 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        value = self.values[self.calls]
        self.calls += 1
        return {self.name: value}


@pytest.fixture
def our_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Capture what hf_divguard says, from INFO up."""
    with caplog.at_level(logging.INFO, logger="hf_divguard"):
        yield caplog
