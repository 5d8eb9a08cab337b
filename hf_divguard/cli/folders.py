"""What stands in an output folder: checkpoints, sizes, times; and the sentences for a path that is none."""

from __future__ import annotations

import difflib
import os
import stat
import time
from pathlib import Path

from hf_divguard.cli.exits import CommandError
from hf_divguard.storage.events import EVENTS_FOLDER
from hf_divguard.storage.names import checkpoint_folders, checkpoint_step
from hf_divguard.storage.regular_files import error_words
from hf_divguard.storage.trainer_state import TRAINER_STATE_NAME

__all__ = [
    "age_of",
    "is_run_folder",
    "open_folder",
    "run_folder",
    "runs_below",
    "saved_at",
]

_MOST_FOLDERS = 20_000


def open_folder(path: str, wanted: str = "the output folder of a run") -> None:
    """Raise a ``CommandError`` unless ``path`` is a folder that can be listed; ``wanted`` is what to give."""
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise CommandError(f"`{path}` is a file. Give {wanted}.")
        with os.scandir(path):
            pass
    except FileNotFoundError:
        if os.path.islink(path):
            raise CommandError(f"`{path}` is a symbolic link that leads nowhere.") from None
        raise CommandError(f"There is no folder `{path}`.{_similar(path)}") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"`{path}` cannot be listed: {error_words(error)}.") from None


def _similar(path: str) -> str:
    """Return a sentence with names like the one that is missing."""
    parent = Path(path).parent
    try:
        names = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(Path(path).name, names, n=2)
    return f" There is {' and '.join(f'`{parent / name}`' for name in close)}." if close else ""


def run_folder(path: str) -> str:
    """Return ``path`` if it is the output folder of a run.

    Raises:
        CommandError: With the way out, if it is not.
    """
    open_folder(path)
    if is_run_folder(path):
        return path
    absolute = os.path.abspath(path)
    if checkpoint_step(os.path.basename(absolute)) is not None:
        raise CommandError(
            f"`{path}` is a checkpoint. Give the output folder that holds it: `{os.path.dirname(absolute)}`."
        )
    below = runs_below(path, most=3)
    hint = f" Below it are runs: {', '.join(f'`{each}`' for each in below)}." if below else ""
    raise CommandError(
        f"`{path}` is not the output folder of a run: it holds neither `checkpoint-<step>` folders nor a "
        f"`{TRAINER_STATE_NAME}`.{hint}"
    )


def is_run_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether checkpoints, a trainer state or our events stand directly in ``path``."""
    if checkpoint_step(os.path.basename(os.path.abspath(path))) is not None:
        return False
    if any(os.path.lexists(os.path.join(path, name)) for name in (TRAINER_STATE_NAME, EVENTS_FOLDER)):
        return True
    return bool(checkpoint_folders(path))


def runs_below(path: str | os.PathLike[str], *, most: int = 10_000) -> list[str]:
    """Return the output folders of runs below ``path``, by name; links are not followed."""
    found: list[str] = []
    for seen, (folder, names, _) in enumerate(os.walk(path)):
        if len(found) >= most or seen > _MOST_FOLDERS:
            break
        if folder != os.fspath(path) and is_run_folder(folder):
            found.append(folder)
        names[:] = sorted(
            name
            for name in names
            if checkpoint_step(name) is None and not name.startswith((".", "_divguard"))
        )
    return found


# ---- time


def saved_at(checkpoint: str) -> float | None:
    """Return when a checkpoint was saved, in seconds since 1970: when its trainer state was written."""
    for name in (os.path.join(checkpoint, TRAINER_STATE_NAME), checkpoint):
        try:
            return os.lstat(name).st_mtime
        except (OSError, ValueError):
            continue
    return None


def age_of(moment: float | None) -> float | None:
    """Return how long ago ``moment`` was, in seconds; 0 for one that lies in the future."""
    return None if moment is None else max(0.0, time.time() - moment)
