"""Text classification on a CSV file; the best three checkpoints by F1 stay on disk.

    python examples/classify_csv.py --output_dir out --max_steps 200 --save_steps 20 \\
        --save_total_limit 1 --eval_on_save --preserve_best_model --preserve_n_best 3 \\
        --best_model_metric f1 --learning_rate 3e-3 --use_cpu --report_to none

``--train_csv`` and ``--eval_csv`` take files with the columns ``text`` and ``label``. Without them
the script writes two such files: docstrings of Python's standard library, and the package that each
one is from.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from python_corpus import make_tokenizer, read_functions
from recipe import Fault, FaultArguments, parse, train_and_report
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments


@dataclass
class DataArguments:
    """The CSV files."""

    train_csv: str | None = field(
        default=None, metadata={"help": "CSV file with the columns text and label."}
    )
    eval_csv: str | None = field(default=None, metadata={"help": "The same, for evaluation."})


def write_csv(path: Path, rows: list[dict[str, str]]) -> str:
    """Write functions as rows of text and label; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"{row['signature']} {row['summary']}", row["package"]] for row in rows)
    return str(path)


def macro_f1(prediction: Any) -> dict[str, float]:
    """Return the mean of the F1 scores of all labels, and the accuracy."""
    guesses, labels = prediction.predictions.argmax(-1), prediction.label_ids
    scores = []
    for label in sorted(set(labels.tolist())):
        hits = int(((guesses == label) & (labels == label)).sum())
        scores.append(2 * hits / max(int((guesses == label).sum() + (labels == label).sum()), 1))
    return {"f1": sum(scores) / len(scores), "accuracy": float((guesses == labels).mean())}


def main() -> None:
    """Read the files, train and print the best checkpoints."""
    fault, data, args = parse(FaultArguments, DataArguments, DivGuardTrainingArguments)
    if data.train_csv is None or data.eval_csv is None:
        rows = read_functions(limit=1200, seed=args.seed)
        folder = Path(args.output_dir)
        data.train_csv = write_csv(folder / "train.csv", rows[240:])
        data.eval_csv = write_csv(folder / "eval.csv", rows[:240])
    files = {"train": data.train_csv, "eval": data.eval_csv}
    table = datasets.load_dataset("csv", data_files=files, cache_dir=f"{args.output_dir}/cache")
    labels = sorted(set(table["train"]["label"]))
    tokenizer = make_tokenizer(list(table["train"]["text"]), is_encoder=True)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], truncation=True)
        return {**encoded, "labels": [labels.index(label) for label in batch["label"]]}

    table = table.map(encode, batched=True, remove_columns=["text", "label"])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    trainer = DivGuardTrainer(
        model=BertForSequenceClassification(config),
        args=args,
        train_dataset=table["train"],
        eval_dataset=table["eval"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=macro_f1,
        callbacks=[Fault(fault)],
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
