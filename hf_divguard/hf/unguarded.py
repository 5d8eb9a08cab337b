"""Notices options of hf_divguard in the arguments of a Trainer that does not guard."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

__all__ = ["note_guarded", "warn_if_unguarded"]

logger = logging.getLogger(__name__)

# By identity, since arguments are equal by value and have no hash. Here and not in an attribute: the arguments
# are saved with all of their attributes in each checkpoint.
_settled: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def note_guarded(args: Any) -> None:
    """Note that a guarded trainer has ``args``."""
    _settled[id(args)] = args


def warn_if_unguarded(args: Any, options: Iterable[str]) -> None:
    """Warn, once for ``args``, that ``options`` have no effect, unless a guarded trainer has them.

    Args:
        args: The arguments that a training starts with.
        options: Names of the options that were set.
    """
    names = list(options)
    if not names or _settled.get(id(args)) is args:
        return
    note_guarded(args)
    if getattr(args, "process_index", 0) == 0:
        logger.warning(
            "%s %s no effect: the options of hf_divguard need a guarded trainer, and this one is not. Use "
            "`DivGuardTrainer`, or `guard(YourTrainer)` for another class.",
            ", ".join(f"`{name}`" for name in names),
            "has" if len(names) == 1 else "have",
        )
