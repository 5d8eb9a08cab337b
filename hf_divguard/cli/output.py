"""What a command prints: plain text or JSON, nothing that a terminal would act on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hf_divguard.core.findings import json_number

__all__ = [
    "SCHEMA",
    "coloured",
    "duration_in_words",
    "number_in_words",
    "print_json",
    "printable",
    "size_in_words",
    "table",
]

SCHEMA = 1
"""Version of the JSON that commands print. A change that breaks a reader raises it; a new field does not."""

_COLOURS = {
    "complete": "32",
    "finished": "32",
    "running": "36",
    "stopped": "33",
    "suspect": "33",
    "unknown": "33",
    "unreadable": "33",
    "incomplete": "31",
    "quarantined": "31",
    "diverged": "31",
    "failed": "31",
}


def print_json(command: str, content: Mapping[str, Any]) -> None:
    """Print one JSON object: ``schema``, ``command``, then ``content``; NaN and infinities become strings."""
    print(json.dumps({"schema": SCHEMA, "command": command, **_strict(content)}, indent=1, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return json_number(value) if isinstance(value, float) else value


def printable(text: object) -> str:
    r"""Return ``text`` on one line, with escapes for whatever a terminal would not print as a character.

    Example:
        >>> printable("red \x1b[31m\n")
        'red \\x1b[31m\\n'
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in shown)


def coloured(word: str) -> str:
    """Return a status word in its colour if standard output is a terminal that shows colours."""
    colour = _COLOURS.get(word)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return word if plain or colour is None else f"\x1b[{colour}m{word}\x1b[0m"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, right: str = "") -> str:
    """Return a table of aligned columns, the last one as long as it is.

    Args:
        head: Names of the columns.
        rows: The cells.
        right: Names of the columns with numbers, separated by spaces; they end at the same place.

    Example:
        >>> print(table(["step", "size"], [[2, "9 kB"], [100, "12 kB"]], right="step"))
        step  size
           2  9 kB
         100  12 kB
    """
    lines = [list(head), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    shown = []
    for number, line in enumerate(lines):
        cells = []
        for name, cell, width in zip(head, line, widths, strict=True):
            padded = cell.rjust(width) if name in right.split() else cell.ljust(width)
            cells.append(padded.replace(cell, coloured(cell)) if number and cell in _COLOURS else padded)
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def size_in_words(size: float) -> str:
    """Return a number of bytes as people write it.

    Example:
        >>> size_in_words(999), size_in_words(14_200_000), size_in_words(3.1e12)
        ('999 B', '14.2 MB', '3.1 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration_in_words(seconds: float) -> str:
    """Return a time span as people say it.

    Example:
        >>> [duration_in_words(each) for each in (0.2, 90, 7000, 100_000, 9e5)]
        ['0 s', '90 s', '117 min', '28 h', '10 days']
    """
    seconds = max(0.0, seconds)
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if round(seconds / length) < most:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def number_in_words(value: float | None) -> str:
    """Return a metric or a loss in few digits; ``-`` for none.

    Example:
        >>> number_in_words(0.123456789), number_in_words(None), number_in_words(float("nan"))
        ('0.123457', '-', 'nan')
    """
    return "-" if value is None else f"{value:.6g}"
