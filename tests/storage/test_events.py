"""The events of a run on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hf_divguard.storage.events import events_path, read_events, write_events
from tests.storage.killing import killed_before_call

FIRST = {"event": "rollback", "number": 1, "step": 210, "finding": {"message": "`loss` = 9 – too high"}}
SECOND = {"event": "gave_up", "number": 2, "step": 590}


def test_events_come_back_as_they_were_written_oldest_first(tmp_path: Path) -> None:
    """One JSON object a line."""
    write_events(tmp_path, [FIRST, SECOND])
    assert read_events(tmp_path) == [FIRST, SECOND]
    lines = events_path(tmp_path).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [FIRST, SECOND]


def test_a_run_without_events_has_none(tmp_path: Path) -> None:
    """No file is not an error."""
    assert read_events(tmp_path) == []


def test_numbers_that_are_not_finite_stay_readable_for_every_parser(tmp_path: Path) -> None:
    """NaN is no JSON."""
    write_events(tmp_path, [{"value": math.nan, "limit": math.inf}])
    event = json.loads(events_path(tmp_path).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert set(event) == {"value", "limit"}


@pytest.mark.parametrize(
    "broken",
    [b'{"event": "roll', b"[1, 2]\n", b"\xff\xfe\n", b"\n\n", b"[" * 100_000 + b"\n", b"NaN\n"],
    ids=["cut short", "no object", "no text", "empty lines", "too deep", "nan"],
)
def test_lines_that_are_no_event_are_left_out(tmp_path: Path, broken: bytes) -> None:
    """The others are still there."""
    write_events(tmp_path, [FIRST])
    path = events_path(tmp_path)
    path.write_bytes(path.read_bytes() + broken)
    assert read_events(tmp_path) == [FIRST]


def test_a_file_too_large_to_be_ours_is_not_read(tmp_path: Path) -> None:
    """It could fill the memory."""
    path = events_path(tmp_path)
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert read_events(tmp_path) == []


def test_killed_at_any_moment_the_file_holds_all_or_what_it_held_before(tmp_path: Path) -> None:
    """It is whole after a kill before each of the calls that change the disk."""
    write_events(tmp_path, [FIRST])
    number = 0
    while killed_before_call(number, lambda: write_events(tmp_path, [FIRST, SECOND])):
        assert read_events(tmp_path) in ([FIRST], [FIRST, SECOND])
        write_events(tmp_path, [FIRST])
        number += 1
    assert number >= 2
    assert read_events(tmp_path) == [FIRST, SECOND]
