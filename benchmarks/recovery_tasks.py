"""What is learnt in the recovery benchmark, and what goes wrong: three kinds of models, eight faults.

The texts are the source code of Python's standard library, so nothing is downloaded. Every task has an error
that no model can get below, and every run is shorter than one pass over its data: the loss of a healthy run
levels out, and ends above zero.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    set_seed,
)

Sample = dict[str, Any]

VOCABULARY = 512
BLOCK = 32
WINDOW = 4
WORDS = 8
IMAGE = 16
GLYPHS = 10


# ---- the data


def token_stream(limit: int = 3_000_000) -> tuple[torch.Tensor, ByteLevelBPETokenizer]:
    """Return the source code of Python's library as tokens, and the tokenizer that was trained on it."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size >= limit:
            break
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=["<hole>"], show_progress=False
    )
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids]
    return torch.tensor(ids), tokenizer


def language_rows(seed: int) -> list[Sample]:
    """Blocks of tokens; the next token is to be told."""
    stream, _ = token_stream()
    blocks = stream[: len(stream) // BLOCK * BLOCK].view(-1, BLOCK)
    return [{"input_ids": block, "labels": block} for block in _shuffled(blocks, seed)]


def word_rows(seed: int) -> list[Sample]:
    """Tokens around a hole; which of the most frequent words stood there is to be told."""
    stream, tokenizer = token_stream()
    words = [
        token
        for token in torch.bincount(stream).argsort(descending=True).tolist()
        if len(tokenizer.decode([token]).strip()) >= 3 and tokenizer.decode([token]).strip().isalpha()
    ][:WORDS]
    half = WINDOW // 2
    rows = []
    for label, word in enumerate(words):
        for place in (stream == word).nonzero().flatten().tolist():
            if half <= place < len(stream) - half:
                window = stream[place - half : place + half].clone()
                window[half] = 0
                rows.append({"input_ids": window, "labels": torch.tensor(label)})
    return _shuffled(rows, seed)


def glyph_rows(seed: int, count: int = 24_000) -> list[Sample]:
    """Ten glyphs under so much noise that nobody could tell them all apart; which one it is is to be told."""
    coarse = torch.rand(GLYPHS, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round()
    shapes = 2.0 * coarse.repeat_interleave(IMAGE // 4, 2).repeat_interleave(IMAGE // 4, 3) - 1.0
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, GLYPHS, (count,), generator=generator)
    images = shapes[labels] + 4.0 * torch.randn(count, 1, IMAGE, IMAGE, generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def _shuffled(rows: Any, seed: int) -> list[Any]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[place] for place in order.tolist()]


# ---- the models


def decoder() -> Any:
    """A small Llama."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=BLOCK,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def encoder() -> Any:
    """A small BERT, with dropout."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=WINDOW,
            num_labels=WORDS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.1,
        )
    )


def image_model() -> Any:
    """A small ResNet; its batch normalisation keeps running means outside of the parameters."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="basic",
            num_labels=GLYPHS,
        )
    )


@dataclass(frozen=True)
class Task:
    """A kind of model with its data."""

    name: str
    title: str
    model: Callable[[], Any]
    rows: Callable[[int], list[Sample]]
    classes: int
    learning_rate: float
    batch: int = 16


TASKS = [
    Task("lm", "decoder, language model", decoder, language_rows, VOCABULARY, 1e-2),
    Task("encoder", "encoder, classifier", encoder, word_rows, WORDS, 2e-3, batch=32),
    Task("resnet", "ResNet, images", image_model, glyph_rows, GLYPHS, 3e-3),
]

EVAL_ROWS = 192
FINAL_EVAL_ROWS = 2048


class Rows(Dataset):
    """Rows for evaluation."""

    def __init__(self, rows: list[Sample]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.rows[index]


class Stream(IterableDataset):
    """Rows in a fixed order, one batch a step; those of some steps have labels drawn by lot.

    A rolled-back run meets the batch of each step once, like every other: what is behind it is not read again.
    """

    def __init__(self, rows: list[Sample], batch: int, classes: int, bad_steps: range) -> None:
        self.rows, self.batch, self.classes, self.bad_steps = rows, batch, classes, bad_steps

    def __iter__(self) -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(99)
        for index, row in enumerate(self.rows):
            if index // self.batch + 1 in self.bad_steps:
                labels = torch.randint(0, self.classes, row["labels"].shape, generator=generator)
                row = {**row, "labels": labels}
            yield row


# ---- the faults


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong from a step on.

    Args:
        name: Short name.
        title: What it is.
        lasts: Steps that it lasts; 0 for ever.
        data: Whether it is in the data.
        clips: Whether gradients are clipped, in all runs of this fault.
    """

    name: str
    title: str
    lasts: int
    data: bool = False
    clips: bool = True

    @property
    def is_permanent(self) -> bool:
        """Whether it never passes."""
        return self.lasts == 0

    def steps(self, first: int, last: int) -> range:
        """Return the steps it covers."""
        return range(first, last + 1 if self.is_permanent else first + self.lasts)


FAULTS = [
    Fault("rate", "learning rate x100 for 20 steps", 20),
    Fault("labels", "labels drawn by lot for 30 steps", 30, data=True),
    Fault("nan", "NaN in one batch", 1),
    Fault("optimizer", "both moments of Adam lost", 1),
    Fault("noise", "noise on all weights, three times as wide as they are", 1),
    Fault("gradients", "gradients x1000 in one random direction for 10 steps, no clipping", 10, clips=False),
    Fault("rate-forever", "learning rate x1000 for good", 0),
    Fault("data-forever", "labels drawn by lot for good", 0, data=True),
]


class FaultCallback(TrainerCallback):
    """Brings about the faults that are not in the data, in the steps they cover."""

    def __init__(self, fault: Fault, steps: range, model: Any) -> None:
        self.fault, self.steps = fault, steps
        self.generator = torch.Generator().manual_seed(5)
        self.poisons = self.explodes = False
        if fault.name == "gradients":
            for weight in model.parameters():
                direction = torch.randn(weight.shape, generator=self.generator)  # the same in every step
                weight.register_hook(lambda gradient, direction=direction: self.explode(gradient, direction))
        if fault.name == "nan":
            first = next(module for module in model.modules() if module._parameters)
            first.register_forward_hook(self.poison)

    def poison(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Put a NaN into what the first layer gives."""
        return output + float("nan") if self.poisons and module.training else output

    def explode(self, gradient: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """Put a huge gradient in the place of a weight's own, in the backward pass: its norm shows it."""
        if not self.explodes or gradient.numel() < 2:
            return gradient
        return 1000.0 * gradient.std() * direction

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what the fault does before the forward pass."""
        is_on = state.global_step + 1 in self.steps
        self.poisons = self.explodes = is_on
        if not is_on:
            return
        optimizer = kwargs["optimizer"]
        if self.fault.name.startswith("rate"):
            for group in optimizer.param_groups:
                group["lr"] *= 1000.0 if self.fault.is_permanent else 100.0
        elif self.fault.name == "optimizer":
            for memory in optimizer.state.values():
                memory["exp_avg"].zero_()
                memory["exp_avg_sq"].zero_()
        elif self.fault.name == "noise":
            with torch.no_grad():
                for weight in kwargs["model"].parameters():
                    spread = float(weight.std()) if weight.numel() > 1 else 0.0
                    weight += 3.0 * spread * torch.randn(weight.shape, generator=self.generator)


def fresh_model(task: Task, seed: int) -> Any:
    """Return the untrained model of a task."""
    set_seed(seed)
    return task.model()
