"""A sequence-to-sequence model, evaluated by generation; the best two checkpoints stay on disk.

    python examples/seq2seq.py --output_dir out --max_steps 150 --save_steps 30 \\
        --eval_on_save --preserve_best_model --preserve_n_best 2 --best_model_metric exact_match \\
        --best_model_greater_is_better true --predict_with_generate --generation_max_length 10 \\
        --divguard_detector adaptive --learning_rate 3e-3 --use_cpu --report_to none

The model learns to write a word backwards. ``guard`` gives ``Seq2SeqTrainer`` and its arguments the
options of hf_divguard.
"""

from __future__ import annotations

import random
from typing import Any

import datasets
from recipe import Fault, FaultArguments, parse, train_and_report
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_divguard import guard

LETTERS = "abcd"
PAD, END = 0, 1


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each letter, and an end token after every word."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    names = ["<pad>", "</s>", *LETTERS]
    letters = Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>")
    )
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>")


def words(number: int, seed: int) -> datasets.Dataset:
    """Return random words with their tokens; the labels are the word backwards."""
    drawn = random.Random(seed)
    texts = ["".join(drawn.choices(LETTERS, k=drawn.randint(2, 4))) for _ in range(number)]
    tokenizer = letter_tokenizer()
    return datasets.Dataset.from_dict(
        {
            "input_ids": tokenizer(texts)["input_ids"],
            "labels": tokenizer([text[::-1] for text in texts])["input_ids"],
        }
    )


def exact_match(prediction: Any) -> dict[str, float]:
    """Return the share of words that are right from the first to the last letter."""

    def word(row: Any) -> list[int]:
        return [int(token) for token in row if token > END]

    pairs = list(zip(prediction.predictions, prediction.label_ids, strict=True))
    return {"exact_match": sum(word(guess) == word(label) for guess, label in pairs) / len(pairs)}


def main() -> None:
    """Train and print the best checkpoints."""
    fault, args = parse(FaultArguments, guard(Seq2SeqTrainingArguments))
    tokenizer = letter_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
    )
    model = T5ForConditionalGeneration(config)
    trainer = guard(Seq2SeqTrainer)(
        model=model,
        args=args,
        train_dataset=words(2000, seed=1),
        eval_dataset=words(64, seed=2),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=exact_match,
        callbacks=[Fault(fault)],
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
