"""What W&B and trackio leave on the disk: offline runs and databases, read without these packages."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import urllib.parse
from collections.abc import Iterator
from typing import Any

from hf_divguard.cli.exits import CommandError
from hf_divguard.cli.protobuf import message_fields, text_of
from hf_divguard.storage.regular_files import error_words, read_bytes

__all__ = ["read_trackio", "read_wandb"]

_MAX_BYTES = 2 << 30
_HEADER = b":W&B"
_HEADER_BYTES, _BLOCK, _RECORD_HEADER = 7, 32768, 7
_WHOLE, _LAST = 1, 4

# Numbers of the fields in the messages Record, HistoryRecord and HistoryItem of W&B.
_HISTORY, _ITEM = 2, 1
_KEY, _NESTED_KEY, _VALUE = 1, 2, 16


def read_wandb(file: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the history in ``run-<id>.wandb`` as rows, and notes.

    Raises:
        CommandError: If it cannot be read, or is no such file.
    """
    try:
        data = read_bytes(file, max_bytes=_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise CommandError(f"`{file}` cannot be read: {error_words(error)}.") from None
    if not data.startswith(_HEADER):
        raise CommandError(f"`{file}` is no file of W&B: it does not begin with {_HEADER.decode()}.")
    rows: list[dict[str, Any]] = []
    try:
        for record in _records(data):
            rows += [_row(value) for number, value in message_fields(record) if number == _HISTORY]
    except (ValueError, struct.error):
        return rows, [f"The end of `{file}` cannot be read and was left out."]
    return rows, []


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in the log format of LevelDB: parts, none of which crosses a block."""
    place, parts = _HEADER_BYTES, b""
    while place + _RECORD_HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _RECORD_HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        place += _RECORD_HEADER
        if kind == 0:
            return
        if place + length > len(data):
            raise ValueError("cut off")
        parts += data[place : place + length]
        place += length
        if kind in (_WHOLE, _LAST):
            yield parts
            parts = b""


def _row(history: int | bytes) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for number, item in message_fields(history if isinstance(history, bytes) else b""):
        if number != _ITEM or not isinstance(item, bytes):
            continue
        fields: dict[int, list[str]] = {}
        for place, value in message_fields(item):
            fields.setdefault(place, []).append(text_of(value))
        key = ".".join(fields.get(_NESTED_KEY) or fields.get(_KEY) or [])
        try:
            row[key] = json.loads(fields.get(_VALUE, ["null"])[0])
        except (ValueError, RecursionError):
            continue
    return row


def read_trackio(file: str) -> list[dict[str, Any]]:
    """Return the entries in a database of trackio as rows; each names its run.

    Raises:
        CommandError: If it cannot be read, or is no such database.
    """
    if os.stat(file).st_size == 0:
        raise CommandError(f"`{file}` is empty.")
    try:
        connection = sqlite3.connect(f"file:{urllib.parse.quote(file)}?mode=ro", uri=True)
        try:
            columns = {str(row[1]) for row in connection.execute("PRAGMA table_info(metrics)")}
            if not {"run_name", "step", "metrics", "timestamp"} <= columns:
                raise CommandError(f"`{file}` is no database of trackio: it has no table `metrics` of runs.")
            run_id = "run_id" if "run_id" in columns else "''"
            found = connection.execute(
                f"SELECT run_name, {run_id}, step, timestamp, metrics FROM metrics ORDER BY id"
            ).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise CommandError(f"`{file}` cannot be read as a database of trackio: {error}.") from None
    ids: dict[str, set[str]] = {}
    for name, own, *_ in found:
        ids.setdefault(str(name), set()).add(str(own))
    rows = []
    for name, own, step, moment, metrics in found:
        try:
            content = json.loads(metrics)
        except (TypeError, ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            run = f"{name} {own}" if len(ids[str(name)]) > 1 else str(name)
            rows.append({**content, "run_name": run, "_step": step, "timestamp": moment})
    return rows
