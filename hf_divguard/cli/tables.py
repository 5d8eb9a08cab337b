"""Tables of log entries: JSON Lines, CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from hf_divguard.cli.exits import CommandError
from hf_divguard.cli.source import Source, source_of_rows, sources_of_runs

_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+(?:[eE][+-]?[0-9]+)?")

__all__ = ["is_json_lines", "read_json_lines", "read_parquet", "read_table", "rows_of_json"]


def is_json_lines(data: bytes) -> bool:
    """Return whether ``data`` begins with a line that is a JSON object, and goes on."""
    first, _, rest = data.lstrip().partition(b"\n")
    if not rest.strip():
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def read_json_lines(path: str, data: bytes, metric: str) -> list[Source]:
    """Return the histories in JSON Lines: a log entry a line."""
    rows: list[Mapping[str, Any]] = []
    notes: list[str] = []
    lines = data.splitlines()
    parse = json.JSONDecoder().decode
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse(line.decode("utf-8"))
        except (ValueError, RecursionError):
            if number == len(lines) and rows:
                notes.append(f"Line {number} is cut off and was left out.")
                break
            raise CommandError(
                f"Line {number} of `{path}` is not JSON. Each line must be one log entry."
            ) from None
        if not isinstance(row, dict):
            raise CommandError(
                f'Line {number} of `{path}` must be a log entry such as {{"step": 1, "loss": 2.5}}.'
            )
        rows.append(row)
    return sources_of_runs(path, rows, notes, metric)


def read_table(path: str, data: bytes, metric: str) -> list[Source]:
    """Return the history of each run in a CSV file: columns ``<run> - <key>`` belong to a run each.

    Cells are separated by what its heading has most of: commas, semicolons or tabs. Unless
    those are commas, a comma stands for a decimal point.
    """
    try:
        text = data.decode("utf-8")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"`{path}` cannot be read as CSV: {error}.") from None
    if delimiter != ",":
        rows = [{key: _with_point(cell) for key, cell in row.items()} for row in rows]
    columns = [name for name in (rows[0] if rows else {}) if isinstance(name, str)]
    if not rows or not columns:
        raise CommandError(f"`{path}` has no rows below its heading.")
    curves = [name for name in columns if " - " in name and not name.endswith(("__MIN", "__MAX"))]
    runs = sorted({name.rpartition(" - ")[0] for name in curves})
    if not runs:
        return sources_of_runs(path, rows, [], metric)
    shared = [name for name in columns if " - " not in name]
    sources = []
    for run in runs:
        own = {name: name.rpartition(" - ")[2] for name in curves if name.rpartition(" - ")[0] == run}
        renamed = [{**{n: row[n] for n in shared}, **{own[n]: row[n] for n in own if row[n]}} for row in rows]
        logged = [row for row in renamed if len(row) > len(shared)]
        sources.append(source_of_rows(f"{path} [{run}]", logged, [], metric))
    return sources


def _with_point(cell: Any) -> Any:
    """Return a number that is written with a decimal comma with a point."""
    is_number = isinstance(cell, str) and _DECIMAL_COMMA.fullmatch(cell.strip())
    return cell.replace(",", ".") if is_number else cell


def read_parquet(path: str, metric: str) -> list[Source]:
    """Return the histories in a Parquet file, as trackio and W&B export it."""
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise CommandError(
            f"`{path}` is a Parquet file, which the package pyarrow reads. Run `pip install pyarrow`, or export the "
            "run as CSV."
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:
        raise CommandError(f"`{path}` cannot be read as Parquet: {error}") from error
    return sources_of_runs(path, rows, [], metric)


def rows_of_json(content: Any, metric: str) -> list[dict[str, Any]] | None:
    """Return the rows of a JSON export of a tracker; ``None`` for what is a history as it is, or is none.

    Trackers export a list of entries with their own names of keys, or a table: for each column a
    mapping from the row to the value.
    """
    if isinstance(content, list) and content and all(isinstance(each, dict) for each in content):
        return None if any(metric in each for each in content) else content
    if isinstance(content, dict) and content and all(isinstance(each, dict) for each in content.values()):
        rows: dict[str, dict[str, Any]] = {}
        for column, cells in content.items():
            for row, value in cells.items():
                rows.setdefault(row, {})[column] = value
        is_table = len(rows) > 1 and any(column.rpartition("/")[2] == metric for column in content)
        return list(rows.values()) if is_table else None
    return None
