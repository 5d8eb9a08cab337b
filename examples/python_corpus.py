"""Text that every machine has, a tokenizer trained on it, and a small model."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import datasets
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["read_texts", "small_llama", "tokenize_and_pack"]


def read_texts(
    folder: str | os.PathLike[str] | None = None, pattern: str = "*.py", limit: int = 3_000_000
) -> list[str]:
    """Return the texts of files in the order of their names, up to about ``limit`` characters.

    Args:
        folder: Where the files are; ``None`` for the source code of Python's standard library.
        pattern: Which files of ``folder`` to take.
        limit: Number of characters after which no further file is read.
    """
    texts: list[str] = []
    size = 0
    for path in sorted(Path(folder or sysconfig.get_paths()["stdlib"]).glob(pattern)):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(texts[-1])
        if size >= limit:
            break
    return texts


def tokenize_and_pack(
    texts: list[str], *, vocabulary: int, block: int, eval_blocks: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Train a tokenizer on ``texts`` and pack them into blocks of one length.

    Args:
        texts: The texts to train on.
        vocabulary: Number of tokens, at least 257.
        block: Tokens per block.
        eval_blocks: Number of blocks held out for evaluation.
        seed: Seed of the split.

    Returns:
        The datasets for training and for evaluation, with ``input_ids`` and ``labels``.
    """
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=["<end>"], show_progress=False)
    end = tokenizer.token_to_id("<end>")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*encoding.ids, end] for encoding in tokenizer.encode_batch(batch["text"])]}

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        stream = [token for ids in batch["input_ids"] for token in ids]
        blocks = [stream[start : start + block] for start in range(0, len(stream) - block + 1, block)]
        return {"input_ids": blocks, "labels": blocks}

    data = datasets.Dataset.from_dict({"text": texts})
    data = data.map(tokenize, batched=True, remove_columns="text").map(pack, batched=True, batch_size=None)
    split = data.shuffle(seed=seed).train_test_split(test_size=eval_blocks, seed=seed)
    return split["train"], split["test"]


def small_llama(
    *, vocabulary: int, block: int, hidden: int = 128, layers: int = 2, seed: int = 0
) -> LlamaForCausalLM:
    """Return a small language model made from a config, the same at every call.

    Args:
        vocabulary: Number of tokens.
        block: Longest sequence.
        hidden: Width; a multiple of 32.
        layers: Number of layers.
        seed: Seed of the initial weights.
    """
    transformers.set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=block,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)
