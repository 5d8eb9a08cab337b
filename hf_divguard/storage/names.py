"""The names of files and folders that checkpoints are made of."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = [
    "DELETING_PREFIX",
    "INCOMPLETE_NAME",
    "MANIFEST_NAME",
    "REPLACED_PREFIX",
    "SIDECAR_NAME",
    "STAGING_NAME",
    "TEMPORARY_PREFIX",
    "checkpoint_folders",
    "checkpoint_name",
    "checkpoint_step",
]

MANIFEST_NAME = "divguard_manifest.json"
"""Written last into a checkpoint: what belongs to it. Its presence says the checkpoint is complete."""

SIDECAR_NAME = "divguard_state.json"
"""State of callbacks, metric and history of a checkpoint."""

INCOMPLETE_NAME = "checkpoint-is-incomplete.txt"
"""Marker that the Trainer's own save on SIGTERM (``enable_jit_checkpoint``) leaves until it has finished."""

STAGING_NAME = "_divguard_staging"
"""Folder inside the run folder where a checkpoint is written before it gets its name.

It begins with an underscore because the Trainer's uploads leave out ``_*`` and
``checkpoint-*`` only, and it does not begin with ``checkpoint-`` because the Trainer
counts, and may delete, whatever does.
"""

REPLACED_PREFIX = "_divguard_replaced-"
"""Where the old folder of a step stands while a new one of the same step takes its name."""

DELETING_PREFIX = "_divguard_deleting-"
"""Where the folder of a step stands while its files are removed."""

TEMPORARY_PREFIX = "_divguard_tmp"
"""Beginning of the names of files that are still being written."""

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of ``step``.

    Example:
        >>> checkpoint_name(120)
        'checkpoint-120'
    """
    return f"checkpoint-{step}"


def checkpoint_step(name: str) -> int | None:
    """Return the step of a checkpoint folder's name, ``None`` for any other name.

    Only the exact form that ``checkpoint_name`` gives is one: no leading zeros, nothing
    behind the digits.

    Example:
        >>> checkpoint_step("checkpoint-120"), checkpoint_step("checkpoint-120.bak")
        (120, None)
    """
    match = _CHECKPOINT.fullmatch(name)
    if match is None or checkpoint_name(int(match[1])) != name:
        return None
    return int(match[1])


def checkpoint_folders(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the checkpoint folders directly inside ``output_dir``, by step, lowest first.

    A symbolic link of such a name is one too, wherever it leads. Files and folders of other
    names are not. A missing ``output_dir`` holds none.

    Raises:
        OSError: If ``output_dir`` is there and cannot be listed.
    """
    try:
        with os.scandir(output_dir) as entries:
            found = {
                step: Path(entry.path)
                for entry in entries
                if (step := checkpoint_step(entry.name)) is not None
                and (entry.is_symlink() or entry.is_dir(follow_symlinks=False))
            }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return dict(sorted(found.items()))
