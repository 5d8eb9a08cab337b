"""Trainer classes of several libraries, each with a tiny model and a few rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import IterableDataset

from tests.tiny import TokenRows, base_arguments, gpt2, tiny_model

WORDS = "the a loss step run model data goes up down fast slow is was good bad new old and or".split()
ROWS = 32


@dataclass(frozen=True)
class Kind:
    """One way to train.

    Args:
        name: As in the table of the documentation.
        parts: Returns the class of the trainer, the class of the arguments, their options and the
            other parts of the trainer; called with the output folder.
        needs: Modules that it needs.
        resumes_exactly: Whether the stock Trainer of this kind ends a resumed run with the same weights.
        fault: Where the NaN is put: into the weights, or into a gradient where weights generate.
    """

    name: str
    parts: Callable[[Path], tuple[Any, Any, dict[str, Any], dict[str, Any]]]
    needs: tuple[str, ...] = ()
    resumes_exactly: bool = True
    fault: str = "weights"
    options: dict[str, Any] = field(default_factory=dict)


def make(
    kind: Kind, output_dir: Path, *, is_guarded: bool = True, callbacks: Any = None, **options: Any
) -> Any:
    """Return a trainer of a kind, guarded or stock, the same at every call."""
    from hf_divguard import guard

    transformers.set_seed(0)
    trainer_class, arguments_class, own_options, parts = kind.parts(Path(output_dir))
    if is_guarded:
        trainer_class, arguments_class = guard(trainer_class), guard(arguments_class)
    if "RANK" in os.environ:
        options.setdefault("ddp_backend", "gloo")
    options = {**base_arguments(output_dir, eval_steps=2), **own_options, **kind.options, **options}
    return trainer_class(args=arguments_class(**options), callbacks=callbacks, **parts)


# ---- Transformers


class Stream(IterableDataset):
    """Rows that have no length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows = TokenRows(rows=ROWS)
        for number in range(1000):
            yield rows[number % ROWS]


def language_model(_: Path) -> Any:
    rows = {"train_dataset": TokenRows(rows=ROWS), "eval_dataset": TokenRows(rows=8, seed=1)}
    return transformers.Trainer, transformers.TrainingArguments, {}, {"model": tiny_model(), **rows}


def streaming(_: Path) -> Any:
    parts = {"model": tiny_model(), "train_dataset": Stream(), "eval_dataset": TokenRows(rows=8, seed=1)}
    return transformers.Trainer, transformers.TrainingArguments, {}, parts


def adapter(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    *classes, options, parts = language_model(folder)
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return (
        *classes,
        {**options, "label_names": ["labels"]},
        {**parts, "model": get_peft_model(parts["model"], lora)},
    )


def sequence_to_sequence(_: Path) -> Any:
    config = transformers.T5Config(
        vocab_size=16,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    parts = {
        "model": transformers.T5ForConditionalGeneration(config),
        "train_dataset": TokenRows(rows=ROWS),
        "eval_dataset": TokenRows(rows=8, seed=1),
    }
    return transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments, {}, parts


def token_classification(_: Path) -> Any:
    config = transformers.BertConfig(**small_bert(16), num_labels=16)
    parts = {
        "model": transformers.BertForTokenClassification(config),
        "train_dataset": TokenRows(rows=ROWS),
        "eval_dataset": TokenRows(rows=8, seed=1),
    }
    return transformers.Trainer, transformers.TrainingArguments, {}, parts


def image_classification(_: Path) -> Any:
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
        hidden_dropout_prob=0.0,
    )
    pixels = torch.rand(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": number % 2} for number, image in enumerate(pixels)]
    parts = {
        "model": transformers.ViTForImageClassification(config),
        "train_dataset": rows,
        "eval_dataset": rows[:8],
    }
    return transformers.Trainer, transformers.TrainingArguments, {}, parts


def small_bert(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


# ---- TRL


def word_tokenizer() -> Any:
    """Return a tokenizer with a token for each of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<unk>", "<pad>", "</s>", *WORDS]
    words = Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        cls_token="</s>",
        sep_token="</s>",
        mask_token="<unk>",
        model_max_length=32,
    )


def sentences(number: int, start: int = 0) -> list[str]:
    return [
        " ".join(WORDS[(start + row * 3 + place) % len(WORDS)] for place in range(6)) for row in range(number)
    ]


def word_model() -> Any:
    return gpt2(vocabulary=len(WORDS) + 3, length=64, width=8, layers=1, heads=1)


def trl(name: str, rows: list[dict[str, Any]], **options: Any) -> Any:
    import datasets
    import trl as library

    data = datasets.Dataset.from_list(rows)
    parts = {
        "model": word_model(),
        "train_dataset": data,
        "eval_dataset": data.select(range(8)),
        "processing_class": word_tokenizer(),
    }
    options = {"bf16": False, "gradient_checkpointing": False, **options}
    return getattr(library, f"{name}Trainer"), getattr(library, f"{name}Config"), options, parts


def supervised(_: Path) -> Any:
    return trl("SFT", [{"text": text} for text in sentences(ROWS)], max_length=16)


def supervised_packed(_: Path) -> Any:
    return trl(
        "SFT",
        [{"text": text} for text in sentences(4 * ROWS)],
        max_length=16,
        packing=True,
        packing_strategy="wrapped",
    )


def supervised_adapter(folder: Path) -> Any:
    from peft import LoraConfig

    *classes, options, parts = supervised(folder)
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return *classes, options, {**parts, "peft_config": lora}


def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "chosen": " " + good, "rejected": " " + bad}
        for prompt, good, bad in zip(sentences(ROWS), sentences(ROWS, 1), sentences(ROWS, 2), strict=True)
    ]


def preferences(_: Path) -> Any:
    *classes, options, parts = trl("DPO", pairs(), max_length=32)
    return *classes, options, {**parts, "ref_model": word_model()}


def reward_model(_: Path) -> Any:
    *classes, options, parts = trl("Reward", pairs(), max_length=32)
    config = transformers.GPT2Config(
        **{**word_model().config.to_diff_dict(), "num_labels": 1, "pad_token_id": 1}
    )
    return *classes, options, {**parts, "model": transformers.GPT2ForSequenceClassification(config)}


def unpaired_preferences(_: Path) -> Any:
    rows = [
        {"prompt": prompt, "completion": " " + text, "label": number % 2 == 0}
        for number, (prompt, text) in enumerate(zip(sentences(ROWS), sentences(ROWS, 1), strict=True))
    ]
    *classes, options, parts = trl("KTO", rows, max_length=32)
    return *classes, options, {**parts, "ref_model": word_model()}


def policy(_: Path) -> Any:
    rows = [{"prompt": prompt} for prompt in sentences(ROWS)]
    *classes, options, parts = trl("GRPO", rows, num_generations=2, max_completion_length=4, beta=0.0)
    reward = lambda completions, **_: [float(text.count("loss")) for text in completions]  # noqa: E731
    return *classes, options, {**parts, "reward_funcs": reward}


# ---- sentence-transformers


def embeddings(folder: Path) -> Any:
    import datasets
    import sentence_transformers as library
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling, Transformer

    stored = folder.parent / "encoder"
    if not (stored / "config.json").exists():
        transformers.BertModel(transformers.BertConfig(**small_bert(len(WORDS) + 3))).save_pretrained(stored)
        word_tokenizer().save_pretrained(stored)
    model = library.SentenceTransformer(modules=[Transformer(str(stored)), Pooling(8)], device="cpu")
    rows = [{"anchor": a, "positive": b} for a, b in zip(sentences(ROWS), sentences(ROWS, 1), strict=True)]
    data = datasets.Dataset.from_list(rows)
    parts = {
        "model": model,
        "train_dataset": data,
        "eval_dataset": data.select(range(8)),
        "loss": MultipleNegativesRankingLoss(model),
    }
    return library.SentenceTransformerTrainer, library.SentenceTransformerTrainingArguments, {}, parts


IMAGES = {"remove_unused_columns": False}

KINDS = {
    kind.name: kind
    for kind in (
        Kind("Trainer", language_model),
        Kind("Trainer, streamed data", streaming),
        Kind("Trainer, LoRA", adapter, needs=("peft",)),
        Kind("Trainer, tokens", token_classification),
        Kind("Trainer, images", image_classification, resumes_exactly=False, options=IMAGES),
        Kind("Seq2SeqTrainer", sequence_to_sequence),
        Kind("SFTTrainer", supervised, needs=("trl",)),
        Kind("SFTTrainer, LoRA", supervised_adapter, needs=("trl", "peft")),
        Kind("SFTTrainer, packed", supervised_packed, needs=("trl",)),
        Kind("DPOTrainer", preferences, needs=("trl",)),
        Kind("RewardTrainer", reward_model, needs=("trl",)),
        Kind("KTOTrainer", unpaired_preferences, needs=("trl",)),
        Kind("GRPOTrainer", policy, needs=("trl",), resumes_exactly=False, fault="gradient"),
        Kind("SentenceTransformerTrainer", embeddings, needs=("sentence_transformers",)),
    )
}
