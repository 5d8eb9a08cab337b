"""Every place where the supported versions of Transformers differ, and what ends each.

The seam is tested, not the version number: 5.0 still has the loop of 4.57.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import Trainer

__all__ = ["HAS_FINALIZE", "HAS_ROTATE_METHOD", "hidden_save_limit"]

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
