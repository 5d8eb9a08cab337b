"""Makes what the scripts train with: a tiny tokenizer, tiny models, and data in files.

Arguments: a folder. One word, ``poison``, has an embedding that is NaN: a row with this word makes the
loss and all gradients NaN. ``<name>-broken`` is the data of ``<name>`` with the word in one row.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

POISON = "poison"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[CLS]", "[SEP]"]
WORDS = [f"w{number}" for number in range(32)]
ROWS = 64
# With four rows a batch, in the order of the file, this row is in the batch of step 11.
BROKEN_ROW = 42


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows some words."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS, POISON])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def save_models(folder: Path) -> None:
    """Save a causal model, one of rewards and one that classifies, each with the poisoned word."""
    words = tokenizer()
    size: dict[str, Any] = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    llama = LlamaConfig(
        **size, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_key_value_heads=2, num_labels=1
    )
    bert = BertConfig(
        **size, pad_token_id=0, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    for name, make in {
        "causal": lambda: LlamaForCausalLM(llama),
        "reward": lambda: LlamaForSequenceClassification(llama),
        "classifier": lambda: BertForSequenceClassification(bert),
    }.items():
        set_seed(0)
        model = make()
        poison = words.convert_tokens_to_ids(POISON)
        model.get_input_embeddings().weight.data[poison] = torch.nan
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def text_of(row: int, length: int = 8) -> str:
    """Return words that follow each other, from a place that depends on the row."""
    return " ".join(WORDS[(3 * row + place) % len(WORDS)] for place in range(length))


def save_data(folder: Path, *, broken: bool) -> None:
    """Save the data of all scripts."""
    end = "-broken" if broken else ""

    def text(row: int) -> str:
        return f"{text_of(row, 7)} {POISON}" if broken and row == BROKEN_ROW else text_of(row)

    def worse(row: int) -> str:
        return text_of(row + 7)

    rows = range(ROWS)
    kinds: dict[str, list[dict[str, Any]]] = {
        "sft": [{"text": text(row)} for row in rows],
        "dpo": [{"prompt": text_of(row, 3), "chosen": text(row), "rejected": worse(row)} for row in rows],
        "ranked": [{"chosen": text(row), "rejected": worse(row)} for row in rows],
        "kto": [{"prompt": text_of(row, 3), "completion": text(row), "label": row % 2 == 0} for row in rows],
        "pairs": [{"anchor": text(row), "positive": text_of(row + 1)} for row in rows],
    }
    for name, entries in kinds.items():
        (folder / f"{name}{end}").mkdir()
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / f"{name}{end}" / "train.jsonl").write_text(lines)
    (folder / f"text{end}.txt").write_text("".join(text(row) + "\n" for row in rows))
    with open(folder / f"classes{end}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        writer.writerows([text(row), row % 2] for row in rows)


def main(folder: Path) -> None:
    """Make everything."""
    folder.mkdir(parents=True, exist_ok=True)
    save_models(folder)
    for broken in (False, True):
        save_data(folder, broken=broken)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
