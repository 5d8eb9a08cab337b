"""How far a run has come, from its ``trainer_state.json`` files: also from one of a million log lines."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_divguard.cli.folders import saved_at
from hf_divguard.cli.records import whole, words
from hf_divguard.storage.events import EVENTS_FOLDER
from hf_divguard.storage.jsonio import parse_json
from hf_divguard.storage.names import STAGING_NAME
from hf_divguard.storage.regular_files import open_regular_file, read_bytes
from hf_divguard.storage.survey import Checkpoint
from hf_divguard.storage.trainer_state import TRAINER_STATE_NAME

__all__ = ["Progress", "last_activity", "read_progress", "seconds_per_step"]

# Reading and replaying more than this takes more than a second.
_MOST_BYTES = 8 << 20
_HEAD, _TAIL = 4096, 1 << 16
_STEP = re.compile(rb'^  "global_step": ([0-9]{1,15}),?$', re.MULTILINE)
_MAX_STEPS = re.compile(rb'^  "max_steps": ([0-9]{1,15}),?$', re.MULTILINE)
_BEST = re.compile(rb'^  "best_model_checkpoint": "([^"\n]{1,4000})"', re.MULTILINE)
_RUNTIME = re.compile(rb'^      "train_runtime": ([0-9.e+]{1,30})', re.MULTILINE)


@dataclass(frozen=True)
class Progress:
    """What the furthest trainer state of a run says.

    Args:
        path: The file; ``None`` if there is none that can be read.
        step: Its step.
        max_steps: The steps that the run is to have; ``None`` if it is not known.
        train_seconds: How long training took, if it has ended.
        best_checkpoint: Name of the folder that the Trainer itself takes for the best, if it does.
        content: The file, parsed; ``None`` for one that is too long to be read here.
    """

    path: str | None = None
    step: int | None = None
    max_steps: int | None = None
    train_seconds: float | None = None
    best_checkpoint: str | None = None
    content: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether training came to its end: to its last step, or to the closing entry of the log."""
        at_end = self.step is not None and bool(self.max_steps) and self.step >= (self.max_steps or 0)
        return at_end or self.train_seconds is not None


def read_progress(run_dir: str, found: Sequence[Checkpoint], *, since: float | None = None) -> Progress:
    """Return what the furthest readable trainer state says: that of the newest checkpoint, or of the folder itself.

    Args:
        run_dir: The output folder.
        found: Its checkpoints, oldest save first.
        since: When training was resumed from an earlier step: the folder's own state must be newer.
    """
    newest = Progress()
    for each in reversed(found[-5:]):
        newest = _read(Path(each.path, TRAINER_STATE_NAME))
        if newest.step is not None:
            break
    own = _read(Path(run_dir, TRAINER_STATE_NAME))
    # The folder's own is written at the end of training; an older training may have left it.
    is_further = own.step is not None and own.step >= (newest.step or 0)
    if is_further and since is not None and os.lstat(own.path or run_dir).st_mtime < since:
        is_further = False
    return own if is_further else newest


def _read(path: Path) -> Progress:
    try:
        if path.stat().st_size > _MOST_BYTES:
            return _ends_of(path)
        content = parse_json(read_bytes(path, max_bytes=_MOST_BYTES), what="it", allow_nan=True)
    except (OSError, ValueError):
        return Progress()
    if not isinstance(content, dict):
        return Progress()
    log = content.get("log_history")
    last = log[-1] if isinstance(log, list) and log and isinstance(log[-1], dict) else {}
    seconds = last.get("train_runtime")
    best = words(content.get("best_model_checkpoint"), 4096)
    return Progress(
        str(path),
        whole(content.get("global_step")),
        whole(content.get("max_steps")),
        float(seconds) if isinstance(seconds, (int, float)) and not isinstance(seconds, bool) else None,
        os.path.basename(os.path.normpath(best)) if best else None,
        content,
    )


def _ends_of(path: Path) -> Progress:
    """Return the same from the first and last bytes of a long file, as the Trainer writes it: keys in order."""
    descriptor = open_regular_file(path)
    try:
        head = os.read(descriptor, _HEAD)
        os.lseek(descriptor, -_TAIL, os.SEEK_END)
        tail = os.read(descriptor, _TAIL)
    finally:
        os.close(descriptor)
    step, limit, best = _STEP.search(head), _MAX_STEPS.search(tail), _BEST.search(head)
    runtime = _RUNTIME.search(tail)
    return Progress(
        str(path),
        int(step[1]) if step else None,
        int(limit[1]) if limit else None,
        float(runtime[1]) if runtime else None,
        os.path.basename(os.path.normpath(best[1].decode(errors="replace"))) if best else None,
    )


# ---- time


def last_activity(run_dir: str, newest: Checkpoint | None) -> float | None:
    """Return when something in the output folder changed last, in seconds since 1970.

    Log files in ``runs`` and ``divguard``, checkpoints that are being written and the newest
    checkpoint count.
    """
    moments = []
    for folder in (run_dir, *(os.path.join(run_dir, name) for name in ("runs", EVENTS_FOLDER, STAGING_NAME))):
        moments += _times_in(folder, depth=2 if folder != run_dir else 0)
    if newest is not None and (saved := saved_at(newest.path)) is not None:
        moments.append(saved)
    return max(moments, default=None)


def _times_in(folder: str, depth: int) -> list[float]:
    times: list[float] = []
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number > 20_000:
                    break
                is_folder = entry.is_dir(follow_symlinks=False)
                # The time of a checkpoint folder changes when somebody looks at it with other tools.
                if not is_folder:
                    times.append(entry.stat(follow_symlinks=False).st_mtime)
                elif depth:
                    times += _times_in(entry.path, depth - 1)
    except OSError:
        pass
    return times


def seconds_per_step(found: Sequence[Checkpoint], progress: Progress) -> float | None:
    """Return how long a step took: the median between the last checkpoints, or the mean of the training."""
    saves = [(each.step, moment) for each in found[-20:] if (moment := saved_at(each.path)) is not None]
    paces = sorted(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for earlier, later in itertools.pairwise(saves)
        if later[0] > earlier[0] and later[1] > earlier[1]
    )
    if paces:
        return paces[len(paces) // 2]
    if progress.train_seconds and progress.step:
        return progress.train_seconds / progress.step
    return None
