"""What a loss function changes on its trainer while it is only asked for a loss."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

__all__ = ["values_kept"]


@contextlib.contextmanager
def values_kept(holder: Any) -> Iterator[None]:
    """Put numbers, and containers of metrics and logs, back that are attributes of ``holder``."""
    before = dict(vars(holder))
    containers = {
        name: copy.deepcopy(value)
        for name, value in before.items()
        if isinstance(value, (dict, list)) and ("metrics" in name or "logs" in name)
    }
    try:
        yield
    finally:
        for name, value in list(vars(holder).items()):
            if name in containers:
                setattr(holder, name, containers[name])
            elif name in before and isinstance(before[name], (int, float)) and value is not before[name]:
                setattr(holder, name, before[name])
            elif name not in before and isinstance(value, (int, float, dict, list)):
                delattr(holder, name)
