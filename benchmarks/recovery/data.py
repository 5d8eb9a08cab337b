"""Synthetic rows: chains of tokens and noisy glyphs, in domains that differ in what there is to learn.

Every domain has an error that no model can get below, so the loss of a healthy run levels out above zero. A pool
is a dictionary of tensors whose first dimension is the row; pools of one task can be mixed row by row, except
``long``, whose rows have another shape.
"""

from __future__ import annotations

from functools import lru_cache

import torch

Pool = dict[str, torch.Tensor]

VOCABULARY = 48
MASK = VOCABULARY
BEGIN = VOCABULARY + 1
TOKENS = VOCABULARY + 2
LENGTH = 20
LONG = 56
CLASSES = 10
TOPICS = 8
IMAGE = 16
IGNORED = -100

DOMAINS = ("a", "b", "c", "base", "easy", "hard", "noisy", "permuted", "long", "random")

# Spread of the logits of the chains: the larger, the less there is left to chance.
SPREAD = {"easy": 6.0, "hard": 2.0}
SEED_OF = {"a": 1, "b": 2, "c": 3, "base": 4, "hard": 5}


@lru_cache(maxsize=64)
def chain(domain: str, part: int = 0) -> torch.Tensor:
    """Return the probabilities of the next token, one row for each token.

    Domains that are variants of ``a`` (easy, noisy, permuted, long) have its chain; ``base``, on which a base model
    is trained before it gets adapters, shares half of its rows with ``a``.
    """
    if domain == "random":
        return torch.full((VOCABULARY, VOCABULARY), 1.0 / VOCABULARY)
    generator = torch.Generator().manual_seed(100 * SEED_OF.get(domain, 1) + part)
    logits = SPREAD.get(domain, 3.5) * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    table = logits.softmax(-1)
    if domain == "base":
        table[::2] = chain("a", part)[::2]
    return table


def walk(table: torch.Tensor, first: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return rows of tokens that follow a chain, ``first`` included."""
    columns = [first]
    for _ in range(length - 1):
        columns.append(torch.multinomial(table[columns[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(columns, 1)


def varied(tokens: torch.Tensor, domain: str, generator: torch.Generator) -> torch.Tensor:
    """Return the tokens as the domain has them: renamed, or with some replaced by lot."""
    if domain == "permuted":
        names = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(77))
        return names[tokens]
    if domain == "noisy":
        wrong = torch.rand(tokens.shape, generator=generator) < 0.4
        return torch.where(wrong, torch.randint(0, VOCABULARY, tokens.shape, generator=generator), tokens)
    return tokens


def _rows(
    domain: str, count: int, generator: torch.Generator, *, part: int = 0, length: int = LENGTH
) -> torch.Tensor:
    first = torch.randint(0, VOCABULARY, (count,), generator=generator)
    long = LONG if domain == "long" else length
    return varied(walk(chain(domain, part), first, long, generator), domain, generator)


def language_pool(domain: str, count: int, seed: int) -> Pool:
    """Rows for a decoder: the next token is to be predicted."""
    tokens = _rows(domain, count, torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def masked_pool(domain: str, count: int, seed: int) -> Pool:
    """Rows for an encoder: tokens of one of eight topics, a fifth of them masked and to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    topics = chain(domain)[torch.randint(0, TOPICS, (count,), generator=generator)]
    length = LONG if domain == "long" else LENGTH
    tokens = varied(
        torch.multinomial(topics, length, replacement=True, generator=generator), domain, generator
    )
    hidden = torch.rand(tokens.shape, generator=generator) < 0.2
    hidden[:, 3] = True
    return {
        "input_ids": tokens.masked_fill(hidden, MASK),
        "labels": tokens.masked_fill(~hidden, IGNORED),
    }


def translation_pool(domain: str, count: int, seed: int) -> Pool:
    """Rows for a sequence-to-sequence model: the target follows the chain, of two, that the source follows."""
    generator = torch.Generator().manual_seed(seed)
    sources, targets = zip(
        *(
            (
                _rows(domain, count, generator, part=part, length=8),
                _rows(domain, count, generator, part=part, length=12),
            )
            for part in (0, 1)
        ),
        strict=True,
    )
    part = torch.randint(0, 2, (count, 1), generator=generator).bool()
    return {"input_ids": torch.where(part, *sources), "labels": torch.where(part, *targets)}


def image_pool(domain: str, count: int, seed: int) -> Pool:
    """Ten glyphs under noise; which one it is is to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    shapes_of = torch.Generator().manual_seed(SEED_OF.get(domain, 1) if domain != "hard" else 1)
    coarse = torch.rand(CLASSES, 1, 4, 4, generator=shapes_of).round()
    shapes = 2.0 * coarse.repeat_interleave(IMAGE // 4, 2).repeat_interleave(IMAGE // 4, 3) - 1.0
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = {"easy": 1.0, "hard": 3.0}.get(domain, 1.8)
    pixels = shapes[labels] + noise * torch.randn(count, 1, IMAGE, IMAGE, generator=generator)
    if domain == "long":  # images have no length: another exposure instead
        pixels = 0.4 * pixels + 0.5
    if domain == "permuted":
        labels = (labels + 3) % CLASSES
    if domain in ("noisy", "random"):
        share = 0.4 if domain == "noisy" else 1.0
        wrong = torch.rand(count, generator=generator) < share
        labels = torch.where(wrong, torch.randint(0, CLASSES, (count,), generator=generator), labels)
    return {"pixel_values": pixels, "labels": labels}
