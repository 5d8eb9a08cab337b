"""Trains a language model on a text file, in the form of ``run_clm.py`` of Transformers; it knows no hf_divguard."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

torch.set_num_threads(1)


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = field(metadata={"help": "Folder of the model."})


@dataclass
class DataArguments:
    """Which data."""

    train_file: str = field(metadata={"help": "A text file."})
    block_size: int = field(default=8, metadata={"help": "Tokens of a row."})


def main() -> None:
    """Train."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("text", data_files={"train": data_args.train_file})
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)

    def group(examples: Any) -> Any:
        joined = {key: list(chain(*examples[key])) for key in examples}
        length = len(joined["input_ids"]) // data_args.block_size * data_args.block_size
        blocks = {
            key: [values[at : at + data_args.block_size] for at in range(0, length, data_args.block_size)]
            for key, values in joined.items()
        }
        return blocks | {"labels": [list(block) for block in blocks["input_ids"]]}

    tokenized = raw.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"])
    rows = tokenized.map(group, batched=True)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


if __name__ == "__main__":
    main()
