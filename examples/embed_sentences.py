"""Sentence embeddings with sentence-transformers; the best checkpoints by evaluation loss stay on disk.

    python examples/embed_sentences.py --output_dir out --max_steps 60 --save_steps 15 \\
        --save_total_limit 1 --eval_on_save --preserve_best_model --preserve_n_best 2 \\
        --divguard_detector adaptive --divguard_action rollback \\
        --learning_rate 3e-3 --per_device_train_batch_size 32 --use_cpu --report_to none

The signature of a function and what it does are to get similar embeddings. It needs
``sentence-transformers``.
"""

from __future__ import annotations

from pathlib import Path

import datasets
from python_corpus import make_tokenizer, read_functions
from recipe import Fault, FaultArguments, parse, train_and_report
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel

from hf_divguard import guard


def small_encoder(folder: Path, texts: list[str]) -> SentenceTransformer:
    """Return an encoder made from a config; it is stored in ``folder`` once, as its class loads from disk."""
    tokenizer = make_tokenizer(texts, is_encoder=True)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = Transformer(str(folder))
    return SentenceTransformer(modules=[words, Pooling(64)], device="cpu")


def main() -> None:
    """Train on pairs of texts and print the best checkpoints."""
    fault, args = parse(FaultArguments, guard(SentenceTransformerTrainingArguments))
    functions = read_functions(limit=800, seed=args.seed)
    pairs = datasets.Dataset.from_list(
        [{"anchor": each["signature"], "positive": each["summary"]} for each in functions]
    )
    split = pairs.train_test_split(test_size=64, seed=args.seed)
    texts = [" ".join(each.values()) for each in functions]
    model = small_encoder(Path(args.output_dir) / "untrained", texts)
    trainer = guard(SentenceTransformerTrainer)(
        model=model,
        args=args,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[Fault(fault)],
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
