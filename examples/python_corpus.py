"""Text that every machine has, tokenizers trained on it, and a small model."""

from __future__ import annotations

import ast
import os
import random
import sysconfig
from pathlib import Path

import datasets
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "make_tokenizer",
    "read_functions",
    "read_texts",
    "save_base_model",
    "small_llama",
    "tokenize_and_pack",
]

PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "unittest")
"""Packages of Python's standard library with many documented functions."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


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


def read_functions(*, limit: int = 1000, seed: int = 0) -> list[dict[str, str]]:
    """Return documented functions of Python's standard library, in random order.

    Args:
        limit: Number of functions to return, at most.
        seed: Seed of the order.

    Returns:
        For each function its ``package``, its ``signature`` and the first line of its docstring,
        its ``summary``.
    """
    functions: list[dict[str, str]] = []
    for package in PACKAGES:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"], package).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    summary = (ast.get_docstring(node) or "").strip().split("\n")[0]
                    signature = f"{node.name}({', '.join(argument.arg for argument in node.args.args)})"
                    if summary:
                        functions.append({"package": package, "signature": signature, "summary": summary})
    random.Random(seed).shuffle(functions)
    return functions[:limit]


def make_tokenizer(
    texts: list[str], *, vocabulary: int = 512, longest: int = 64, is_encoder: bool = False
) -> PreTrainedTokenizerFast:
    """Train a tokenizer with a token for padding, one for the end and a chat template.

    Args:
        texts: The texts to train on.
        vocabulary: Number of tokens, at least 260.
        longest: Number of tokens after which a text is cut off.
        is_encoder: Whether it is for a model that reads only, and marks the start of a text.
    """
    special = ["<pad>", "<end>", "<start>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    names = {"cls_token": "<start>", "sep_token": "<end>", "mask_token": "<mask>"} if is_encoder else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        model_max_length=longest,
        chat_template=CHAT_TEMPLATE,
        **names,
    )


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


def save_base_model(folder: str | os.PathLike[str], **size: int) -> str:
    """Save a :func:`small_llama` in ``folder`` for trainers that load a model themselves; return the folder."""
    small_llama(**size).save_pretrained(folder)
    return os.fspath(folder)
