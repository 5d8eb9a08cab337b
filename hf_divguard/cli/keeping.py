"""Which checkpoints stay and why: the rules of the ledger, and what a person must not lose."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from functools import cached_property

from hf_divguard.cli.exits import USAGE, CommandError
from hf_divguard.core.retention import LatestN
from hf_divguard.storage.checkpoints import ledger_of, ranked, ranking
from hf_divguard.storage.disk_usage import DiskUsage
from hf_divguard.storage.ledger import CheckpointLedger
from hf_divguard.storage.survey import Checkpoint, find_with_usage

__all__ = ["Plan", "Survey", "survey"]

# A checkpoint that is being written looks incomplete.
_YOUNG_SECONDS = 3600.0


@dataclass(frozen=True)
class Survey:
    """The checkpoints of an output folder and how they rank.

    Args:
        run_dir: The output folder.
        found: The checkpoints, oldest save first.
        ledger: What is known of them together.
        metric_key: Key of the metric that ranks.
        greater_is_better: Its direction; ``None`` if it is not known, and nothing is ranked.
        best: Those that can be ranked, best first.
        usage: What the checkpoints take on the disk.
    """

    run_dir: str
    found: list[Checkpoint]
    ledger: CheckpointLedger
    metric_key: str
    greater_is_better: bool | None
    best: list[Checkpoint]
    usage: DiskUsage

    @cached_property
    def complete(self) -> list[Checkpoint]:
        """The complete checkpoints, oldest save first."""
        return [each for each in self.found if each.verdict.status == "complete"]

    @cached_property
    def metrics(self) -> dict[int, float | None]:
        """The ranking metric of each checkpoint, by step."""
        own = {each.step: each.metric for each in self.found}
        return own | {each.step: each.metric for each in self.best}


def survey(run_dir: str, metric: str | None, greater: bool | None) -> Survey:
    """Look at the checkpoints of ``run_dir``."""
    found, usage = find_with_usage(run_dir)
    try:
        key, direction = ranking(metric, greater, found)
    except ValueError:
        key, direction = metric or "", None
    ledger = ledger_of(run_dir, found, key)
    best = [] if direction is None else ranked(ledger, found, direction)
    return Survey(run_dir, found, ledger, key, direction, best, usage)


@dataclass
class Plan:
    """What a pruning keeps and deletes.

    Args:
        keep_last: How many of the last saves stay.
        keep_best: How many of the best stay.
        every: Complete ones whose step is a multiple of it stay; ``None`` for no such rule.
        needed: Why some stay whatever the rules say, by step.
        delete: The checkpoints to delete, oldest first.
        reasons: Why each of the others stays, by step.
        last: Steps of the last saves that stay.
    """

    keep_last: int
    keep_best: int
    every: int | None = None
    needed: dict[int, str] = field(default_factory=dict)
    delete: list[Checkpoint] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    last: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--keep-last", self.keep_last, 1),
            ("--keep-best", self.keep_best, 0),
            ("--every", self.every, 1),
        ):
            if value is not None and value < least:
                raise CommandError(f"`{name}` must be at least {least}, got {value}.", USAGE)

    def make(self, seen: Survey) -> Plan:
        """Decide for each checkpoint of ``seen``; return this plan."""
        greater = bool(seen.greater_is_better)
        surplus = (
            set(seen.ledger.to_delete(self.keep_last, self.keep_best, greater)) if seen.complete else set()
        )
        # The ledger compares numbers of saves, which checkpoints of the stock Trainer have not.
        newer = len(seen.complete)
        for each in seen.found:
            newer -= each.verdict.status == "complete"
            if each.verdict.status == "incomplete" and newer >= self.keep_last:
                surplus.add(each.step)
        good = seen.ledger.counting(seen.ledger.records)
        self.last = LatestN(self.keep_last).keep(good) if good else set()
        places = {each.step: place for place, each in enumerate(seen.best[: self.keep_best], start=1)}
        newest = seen.complete[-1].step if seen.complete else None
        for each in seen.found:
            reason = self._reason(each, seen, places=places, newest=newest)
            if reason is None and each.step in surplus:
                self.delete.append(each)
            else:
                self.reasons[each.step] = reason or f"{each.verdict.status}: not enough newer complete ones"
        return self

    def _reason(
        self, each: Checkpoint, seen: Survey, *, places: dict[int, int], newest: int | None
    ) -> str | None:
        step, status = each.step, each.verdict.status
        words = []
        if not seen.complete:
            words.append("no checkpoint is complete: nothing is deleted")
        if step in seen.ledger.linked:
            words.append("a symbolic link is never deleted")
        if status == "unreadable":
            words.append("unreadable: never deleted")
        if status == "incomplete" and _is_young(each.path):
            words.append("may still be written")
        if step in self.needed:
            words.append(self.needed[step])
        if step == newest:
            words.append("newest complete")
        elif step in self.last:
            words.append(f"last {self.keep_last}")
        if step in places:
            words.append(f"best {places[step]} of {self.keep_best}" if self.keep_best > 1 else "best")
        if self.every is not None and status == "complete" and step % self.every == 0:
            words.append(f"every {self.every}")
        if status == "suspect" and step in sorted(seen.ledger.suspects)[-self.keep_last :]:
            words.append("suspect, of the last saves")
        return "; ".join(words) or None


def _is_young(path: str) -> bool:
    newest = 0.0
    try:
        newest = os.lstat(path).st_mtime
        with os.scandir(path) as entries:
            newest = max([newest, *(entry.stat(follow_symlinks=False).st_mtime for entry in entries)])
    except OSError:
        return True
    return time.time() - newest < _YOUNG_SECONDS
