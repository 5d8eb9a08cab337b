"""The data switches: 27 kinds. Nothing is broken, so a guard has to leave them alone, to the bit.

A schedule gives for every step the shares of the domains in its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

STEPS = 240
"""Steps of all runs."""

Shares = dict[str, float]
Schedule = Callable[[float, int], Shares]
"""From the share of the run that is done, and the step counted from 1, to the shares of the domains."""


@dataclass(frozen=True)
class Switch:
    """A change of the data.

    Args:
        name: Short name.
        title: What it is.
        half: Half of the benchmark.
        schedule: The domains, step by step.
    """

    name: str
    title: str
    half: str
    schedule: Schedule


def steady(done: float, step: int) -> Shares:
    """The data of all runs without a switch."""
    return {"a": 1.0}


def at(where: float, to: str, origin: str = "a") -> Schedule:
    """Change from one domain to another for good."""
    return lambda done, step: {origin if done < where else to: 1.0}


def turns(period: int, to: str, since: float = 0.3) -> Schedule:
    """From some point on take turns between ``a`` and another domain, every ``period`` steps."""
    return lambda done, step: {to if done >= since and step // period % 2 else "a": 1.0}


def block(first: float, last: float, to: str) -> Schedule:
    """Another domain for a part of the run, then ``a`` again."""
    return lambda done, step: {to if first <= done < last else "a": 1.0}


def mixed(since: float, to: str, share: float, ramp: float = 0.0) -> Schedule:
    """From some point on mix another domain in, at once or over a part of the run."""

    def shares(done: float, step: int) -> Shares:
        if done < since:
            return {"a": 1.0}
        grown = share if ramp == 0.0 else share * min((done - since) / ramp, 1.0)
        return {"a": 1.0 - grown, to: grown}

    return shares


def stages(*domains: str) -> Schedule:
    """Go through domains in parts of equal length."""
    return lambda done, step: {domains[min(int(done * len(domains)), len(domains) - 1)]: 1.0}


def cycle(period: int, *domains: str, since: float = 0.2) -> Schedule:
    """From some point on go through domains again and again, ``period`` steps each."""
    return lambda done, step: {domains[step // period % len(domains)] if done >= since else domains[0]: 1.0}


def blocks(lengths: tuple[int, ...], *domains: str, since: int = 60) -> Schedule:
    """From a step on blocks of these lengths, each of the next domain, again and again."""

    def shares(done: float, step: int) -> Shares:
        left, place = step - since, 0
        while left >= lengths[place % len(lengths)]:
            left -= lengths[place % len(lengths)]
            place += 1
        return {domains[0] if step < since else domains[(place + 1) % len(domains)]: 1.0}

    return shares


def sway(period: int, to: str, most: float = 1.0, since: float = 0.25) -> Schedule:
    """From some point on the share of another domain goes up and down again and again."""

    def shares(done: float, step: int) -> Shares:
        if done < since:
            return {"a": 1.0}
        share = most * 0.5 * (1.0 - math.cos(2.0 * math.pi * (done - since) * STEPS / period))
        return {"a": 1.0 - share, to: share}

    return shares


def every(period: int, to: str, since: float) -> Schedule:
    """From some point on one batch in ``period`` is of another domain."""
    return lambda done, step: {to if done >= since and step % period == 0 else "a": 1.0}


SWITCHES = {
    switch.name: switch
    for switch in (
        Switch("new_middle", "new learnable data from the middle on", "design", at(0.5, "b")),
        Switch("hard_middle", "harder data from the middle on", "design", at(0.5, "hard")),
        Switch("back_forth_40", "back and forth every 40 steps", "design", turns(40, "b")),
        Switch("mixture_half", "half of each batch new from the middle on", "design", mixed(0.5, "b", 0.5)),
        Switch("long_middle", "longer sequences (images: another exposure)", "design", at(0.5, "long")),
        Switch("new_late", "new learnable data near the end", "design", at(0.85, "b")),
        Switch("hard_block", "a block of harder data for 25 steps", "design", block(0.5, 0.604, "hard")),
        Switch("easy_first", "easy data first, then the usual", "design", at(0.35, "a", "easy")),
        Switch("every_fifth", "every fifth batch new from the middle on", "design", every(5, "b", 0.5)),
        Switch("curriculum_four", "easy, usual, noisy, new", "design", stages("easy", "a", "noisy", "b")),
        Switch("back_forth_8", "back and forth every 8 steps", "design", turns(8, "b", 0.25)),
        Switch("back_forth_15", "back and forth every 15 steps", "design", turns(15, "c")),
        Switch("back_forth_25", "back and forth every 25 steps", "design", turns(25, "b", 0.25)),
        Switch("cycle_three", "three domains in turn, 12 steps each", "design", cycle(12, "a", "b", "hard")),
        Switch(
            "uneven_blocks",
            "blocks of two domains, 5 to 30 steps long",
            "design",
            blocks((12, 30, 5, 20, 17), "a", "b"),
        ),
        Switch("sway", "the share of new data goes up and down every 48 steps", "design", sway(48, "b")),
        Switch(
            "old_again",
            "new data for a quarter of the run, then the old ones",
            "design",
            block(0.45, 0.7, "b"),
        ),
        Switch("permuted_middle", "labels (tokens) renamed from the middle on", "judge", at(0.5, "permuted")),
        Switch(
            "noisy_middle", "two of five labels (tokens) random from the middle on", "judge", at(0.5, "noisy")
        ),
        Switch(
            "uneven_turns",
            "10 steps of new data, then 30 of the old ones",
            "judge",
            blocks((10, 30), "a", "c"),
        ),
        Switch("mixture_ramp", "new data come in over 100 steps", "judge", mixed(0.4, "c", 1.0, ramp=0.4)),
        Switch("new_early", "new learnable data early", "judge", at(0.15, "c")),
        Switch("three_domains", "three domains one after the other", "judge", stages("a", "c", "b")),
        Switch("two_blocks", "two blocks of new data", "judge", stages(*"a c a a c a".split())),
        Switch("alternate", "batches of two domains in turn from the middle on", "judge", every(2, "c", 0.5)),
        Switch("long_early", "longer sequences, then shorter ones again", "judge", block(0.3, 0.6, "long")),
        Switch(
            "easy_late", "much easier data near the end, then the usual", "judge", block(0.7, 0.85, "easy")
        ),
    )
}
