"""Every place where the supported versions of Transformers differ, and what ends each.

The seam is tested, not the version number: 5.0 still has the loop of 4.57.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from transformers import Trainer

__all__ = ["HAS_FINALIZE", "HAS_ROTATE_METHOD", "hidden_save_limit", "load_without_warnings", "rewrite_best"]

HAS_ROTATE_METHOD = hasattr(Trainer, "_rotate_checkpoints")
"""4.57 to 5.0 rotate through a method, later versions through a module function. Ends with 4.x support."""

HAS_FINALIZE = hasattr(Trainer, "_finalize_training")
"""Later 5.x end training in a method of its own; before, inside ``_inner_training_loop``. Ends with 4.x support."""


@contextlib.contextmanager
def hidden_save_limit(args: Any) -> Iterator[int | None]:
    """Hide ``args.save_total_limit`` from the host, which then deletes nothing.

    The function that rotates in 5.x has no seam; it does nothing without a limit.
    """
    limit = args.save_total_limit
    args.save_total_limit = None
    try:
        yield limit
    finally:
        args.save_total_limit = limit


def load_without_warnings(trainer: Any, checkpoint: str) -> None:
    """Have the host load the weights of ``checkpoint``, without its word on keys that are missing.

    It warns of the second name of tied weights too, which no file holds. The caller checks
    for itself what came.
    """
    trainer._issue_warnings_after_load = lambda *args, **kwargs: None  # shadows the method
    try:
        trainer._load_from_checkpoint(checkpoint)
    finally:
        del trainer._issue_warnings_after_load


_BEST_FIELDS = ("best_global_step", "best_metric", "best_model_checkpoint")
# The host dumps its state with sorted keys and an indent of two, so the three stand at the top, a line each.
_BEST_LINES = re.compile(r"\A\{\n" + "".join(rf'  "{name}": [^\n]*,\n' for name in _BEST_FIELDS))


def rewrite_best(state: Any, path: str | os.PathLike[str]) -> None:
    """Bring what the file at ``path`` says of the best checkpoint up to ``state``, with which it was written.

    Writing the whole state anew takes, with some hundred log entries, as long as writing a
    small model. A file of another form is written anew all the same.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    head = _BEST_LINES.match(text)
    if head is None:
        state.save_to_json(os.fspath(path))
        return
    lines = "".join(f'  "{name}": {json.dumps(getattr(state, name))},\n' for name in _BEST_FIELDS)
    if head[0] == "{\n" + lines:
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write("{\n" + lines + text[head.end() :])
