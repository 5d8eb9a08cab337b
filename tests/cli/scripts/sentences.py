"""Trains a model of sentence-transformers on pairs; it knows no hf_divguard. Arguments: model, data, output folder."""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers import models as parts
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import set_seed

torch.set_num_threads(1)


def main(model_path: str, data: str, folder: str) -> None:
    """Train."""
    set_seed(42)
    words = parts.Transformer(model_path)
    model = SentenceTransformer(
        modules=[words, parts.Pooling(words.get_word_embedding_dimension())], device="cpu"
    )
    args = SentenceTransformerTrainingArguments(
        folder,
        max_steps=14,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
    )
    rows = load_dataset(data, split="train")
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=rows, loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    trainer.save_model(folder)
    trainer.save_state()


if __name__ == "__main__":
    main(*sys.argv[1:])
