"""Trains a classifier on a CSV file, in the form of ``run_glue.py`` of Transformers; it knows no hf_divguard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

torch.set_num_threads(1)


@dataclass
class ScriptArguments:
    """Which model, and which data."""

    model_name_or_path: str = field(metadata={"help": "Folder of the model."})
    train_file: str = field(metadata={"help": "A CSV file with the columns sentence and label."})
    validation_file: str = field(metadata={"help": "The same, to evaluate on."})


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy."""
    guesses = np.argmax(prediction.predictions, axis=1)
    return {"accuracy": float((guesses == prediction.label_ids).mean())}


def main() -> None:
    """Train and evaluate."""
    script_args, training_args = HfArgumentParser(
        (ScriptArguments, TrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset(
        "csv", data_files={"train": script_args.train_file, "validation": script_args.validation_file}
    )
    tokenizer = AutoTokenizer.from_pretrained(script_args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(script_args.model_name_or_path, num_labels=2)

    def preprocess(examples: Any) -> Any:
        return tokenizer(examples["sentence"], padding=False, max_length=64, truncation=True)

    data = raw.map(preprocess, batched=True)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
