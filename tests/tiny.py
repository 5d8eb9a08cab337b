"""A tiny language model, its rows and arguments of short runs: for tests, benchmarks and examples alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

VOCABULARY = 16
LENGTH = 8


class RandomRows(Dataset):
    """Rows of random token ids, for runs in which nothing has to be learnt."""

    def __init__(self, rows: int, length: int, *, vocabulary: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(0, vocabulary, (rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class TokenRows(RandomRows):
    """Rows of token ids that a language model can learn: each row counts upwards."""

    def __init__(self, rows: int = 32, seed: int = 0) -> None:
        super().__init__(rows, 1, vocabulary=VOCABULARY, seed=seed)
        self.rows = (self.rows + torch.arange(LENGTH)) % VOCABULARY


def gpt2(
    *, vocabulary: int, length: int, width: int, layers: int, heads: int, dropout: float = 0.0, seed: int = 0
) -> GPT2LMHeadModel:
    """Return a GPT-2 made from a config, the same at every call."""
    set_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=length,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def tiny_model(seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    """Return a language model of some thousand parameters for :class:`TokenRows`."""
    return gpt2(vocabulary=VOCABULARY, length=LENGTH, width=8, layers=1, heads=1, dropout=dropout, seed=seed)


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
    folders = [path for path in Path(output_dir).iterdir() if path.is_dir() and not path.is_symlink()]
    matches = [re.fullmatch(r"checkpoint-([1-9]\d*)", folder.name) for folder in folders]
    return {int(match[1]) for match in matches if match}


def names_in(output_dir: str | Path) -> list[str]:
    """Return what stands in a run folder, in order, without the folder that holds events and the lock."""
    return sorted(path.name for path in Path(output_dir).iterdir() if path.name != "divguard")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of parameters are equal to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
