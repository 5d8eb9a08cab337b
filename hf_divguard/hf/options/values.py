"""Checks of single values of options."""

from __future__ import annotations

import difflib
import json
import signal
from collections.abc import Iterable
from typing import Any, get_args

__all__ = [
    "check_signals",
    "did_you_mean",
    "json_object",
    "optional_bool",
    "require_bool",
    "require_choice",
    "require_whole",
    "signals_of",
]

_TRUE = {"true", "yes", "1", "t", "y"}
_FALSE = {"false", "no", "0", "f", "n"}


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Return a question that offers the names close to ``word``; empty if none is.

    Example:
        >>> did_you_mean("acuracy", ["accuracy", "f1"])
        " Did you mean 'accuracy'?"
        >>> did_you_mean("zork", ["accuracy", "f1"])
        ''
    """
    close = difflib.get_close_matches(str(word).lower(), sorted(known), n=2, cutoff=0.75)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def optional_bool(name: str, value: Any) -> bool | None:
    """Return true, false or none as written on a command line or in a file."""
    word = str(value).strip().lower()
    if value is None or word in {"none", "null", ""}:
        return None
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"`{name}` must be true, false or none, got {value!r}.")


def require_bool(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, got {value!r} of type {type(value).__name__}.")


def require_whole(name: str, value: Any, unit: str, *, at_least: int, instead: str = "") -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number, large enough."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(
            f"`{name}` must be a whole number of {unit}, at least {at_least}, got {value!r}.{instead}"
        )


def json_object(name: str, value: Any) -> dict[str, Any] | None:
    """Return settings that were given as a mapping or, on a command line, as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(
                f"`{name}` must be a JSON object like '{{\"threshold\": 1.0}}', got {value!r}: {error}."
            ) from None
    if value is None or (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
        return value
    raise ValueError(f"`{name}` must be a JSON object or a dict of settings, got {value!r}.")


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is one of a ``Literal``."""
    if value not in get_args(choices):
        raise ValueError(
            f"`{name}` must be one of {list(get_args(choices))}, got {value!r}."
            f"{did_you_mean(value, get_args(choices))}"
        )


_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")


def signals_of(value: str) -> tuple[str, ...]:
    """Return the names in a list of signals.

    Example:
        >>> signals_of("SIGTERM, sigusr1"), signals_of("none")
        (('SIGTERM', 'SIGUSR1'), ())
    """
    words = [word.strip().upper() for word in value.split(",") if word.strip()]
    return () if words == ["NONE"] else tuple(dict.fromkeys(words))


def check_signals(args: Any, name: str) -> None:
    """Raise ``ValueError`` unless an option lists signals that a run can end on."""
    value = getattr(args, name)
    usable = [each for each in _SIGNALS if hasattr(signal, each)]
    names = signals_of(value) if isinstance(value, str) else None
    if names is None or (not names and value.strip().lower() != "none") or not set(names) <= set(usable):
        raise ValueError(
            f"`{name}` must be none, or one or more of {', '.join(usable)} with commas between them, got {value!r}."
        )
    if "SIGTERM" in names and getattr(args, "enable_jit_checkpoint", False):
        raise ValueError(
            f"`{name}={value}` and `enable_jit_checkpoint=True` both save on SIGTERM. Set one of them; `{name}` saves "
            "at the end of the step, from where a resumed run goes on as one that was not cut."
        )
