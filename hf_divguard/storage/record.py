"""Typed access to the fields of a parsed JSON object, with limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from hf_divguard.storage.jsonio import from_strict

__all__ = [
    "FORMAT_VERSION",
    "LARGEST_INTEGER",
    "LONGEST_PATH",
    "Fields",
    "Quarantine",
    "RecordError",
    "sealed",
]

FORMAT_VERSION = 1
"""Version of the manifest's and the sidecar's form. A reader refuses higher ones."""

LARGEST_INTEGER = 10**18 - 1
"""Steps, sequence numbers and sizes beyond this are refused; it fits 64 bits."""

Quarantine = dict[str, Any]
"""Why a checkpoint is quarantined or suspect: ``reason``, ``onset_step``, ``time``."""

LONGEST_PATH = 4096
"""Paths and file names of more characters are refused."""

_LONGEST_TEXT = 2000
_SEAL = "digest"
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``data`` with a checksum of itself, by which a reader notices a changed byte.

    Example:
        >>> sealed({"step": 1})["digest"][:8]
        '8565a568'
    """
    return {**data, _SEAL: _digest(data)}


def _digest(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != _SEAL}
    return hashlib.sha256(_CANONICAL.encode(rest).encode()).hexdigest()


class RecordError(ValueError):
    """A file of ours inside a checkpoint cannot be understood.

    Args:
        message: What must hold and what was found.
        newer: Whether a newer version of hf_divguard wrote it.
    """

    def __init__(self, message: str, *, newer: bool = False) -> None:
        super().__init__(message)
        self.newer = newer


class Fields:
    """The fields of one JSON object; each reader returns a value of the right type or raises.

    Args:
        data: The parsed object.
        what: What it is, for the messages.
        error: The exception to raise.

    Example:
        >>> Fields({"step": 5}, "the manifest", RecordError).integer("step")
        5
    """

    def __init__(self, data: object, what: str, error: type[RecordError]) -> None:
        self._what = what
        self._error = error
        if not isinstance(data, Mapping):
            raise error(f"{what} must be a JSON object, found {_shown(data)}.")
        self._data: Mapping[str, Any] = data

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def refuse(self, key: str, must: str) -> NoReturn:
        """Raise the error that says what ``key`` must be and what was found."""
        raise self._error(f"`{key}` in {self._what} must be {must}, found {_shown(self._data.get(key))}.")

    def check_format(self) -> None:
        """Raise if the object has no version or one of the future, or is not as it was written."""
        version = self.integer("format")
        if version > FORMAT_VERSION:
            raise self._error(
                f"{self._what} must have format {FORMAT_VERSION} or lower, found {version}. "
                "A newer hf_divguard wrote it: upgrade to read it.",
                newer=True,
            )
        if version < 1:
            self.refuse("format", "at least 1")
        if _SEAL in self._data and self._data[_SEAL] != _digest(self._data):
            raise self._error(f"{self._what} must be as it was written, but its own checksum differs.")

    def integer(self, key: str) -> int:
        """Return the integer under ``key``."""
        value = self._data.get(key)
        if type(value) is not int or not 0 <= value <= LARGEST_INTEGER:
            self.refuse(key, f"an integer from 0 to {LARGEST_INTEGER}")
        return value

    def integer_or_none(self, key: str) -> int | None:
        """Return the integer under ``key``, or ``None``."""
        return None if self._data.get(key) is None else self.integer(key)

    def integers(self, key: str, *, limit: int, least: int = 0) -> tuple[int, ...]:
        """Return the list of ``least`` to ``limit`` integers under ``key``."""
        values = self.entries(key, limit=limit)
        if len(values) < least or any(
            type(value) is not int or not 0 <= value <= LARGEST_INTEGER for value in values
        ):
            self.refuse(key, f"a list of integers from 0 to {LARGEST_INTEGER}")
        return tuple(values)

    def number_or_none(self, key: str) -> float | None:
        """Return the number under ``key``; NaN and infinities are written as ``to_strict`` does."""
        value = self._data.get(key)
        try:
            value = from_strict(value)
            if value is None:
                return None
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        except (ValueError, OverflowError):
            pass
        self.refuse(key, "a number or null")

    def text(self, key: str, *, longest: int = _LONGEST_TEXT) -> str:
        """Return the string under ``key``, which has no control characters."""
        value = self._data.get(key)
        if not isinstance(value, str) or len(value) > longest or not value.isprintable():
            self.refuse(key, f"printable text of at most {longest} characters")
        return value

    def text_or_none(self, key: str) -> str | None:
        """Return the string under ``key``, or ``None``."""
        return None if self._data.get(key) is None else self.text(key)

    def path(self, key: str) -> str:
        """Return the path under ``key``: any text without a null character."""
        value = self._data.get(key)
        if not isinstance(value, str) or not 0 < len(value) <= LONGEST_PATH or "\0" in value:
            self.refuse(key, f"a path of at most {LONGEST_PATH} characters")
        return value

    def path_or_none(self, key: str) -> str | None:
        """Return the path under ``key``, or ``None``."""
        return None if self._data.get(key) is None else self.path(key)

    def boolean(self, key: str) -> bool:
        """Return true or false under ``key``."""
        value = self._data.get(key)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def boolean_or_none(self, key: str) -> bool | None:
        """Return true, false or ``None`` under ``key``."""
        return None if self._data.get(key) is None else self.boolean(key)

    def entries(self, key: str, *, limit: int) -> list[Any]:
        """Return the list under ``key``."""
        value = self._data.get(key)
        if not isinstance(value, list) or len(value) > limit:
            self.refuse(key, f"a list of at most {limit} entries")
        return value

    def mapping(self, key: str, *, limit: int) -> dict[str, Any]:
        """Return the object under ``key``."""
        value = self._data.get(key)
        if not isinstance(value, dict) or len(value) > limit:
            self.refuse(key, f"an object of at most {limit} entries")
        return value

    def note(self, key: str) -> Quarantine | None:
        """Return the note under ``key`` that a checkpoint is quarantined or suspect, ``None`` without one."""
        value = self._data.get(key)
        if value is None:
            return None
        inner = Fields(value, f"`{key}` of {self._what}", self._error)
        onset_step = value.get("onset_step")
        return {
            "reason": inner.text("reason"),
            "onset_step": None if onset_step is None else inner.integer("onset_step"),
            "time": inner.text_or_none("time"),
        }


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return "a longer number"
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)} entries"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
