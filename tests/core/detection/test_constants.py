"""Every constant of the adaptive rule has its source in the documentation, and its row among those that were moved."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.detection.robustness import constants, moved

DOCS = Path(__file__).parents[3] / "docs"


def test_each_constant_has_a_source() -> None:
    text = (DOCS / "detectors.md").read_text(encoding="utf-8")
    table = text[text.index("### Where the constants come from") : text.index("## How good they are")]
    assert [name for name in constants() if f"`{name}`" not in table] == []


def test_each_constant_was_moved_from_the_value_that_it_has() -> None:
    text = (DOCS / "detection" / "robustness.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` (\S+) → ", text, re.MULTILINE)
    assert rows == [(name, f"{value:g}") for name, value in constants().items() for _ in range(2)]


def test_there_are_fewer_than_in_the_first_version() -> None:
    assert len(constants()) < 79


def test_a_constant_is_moved_in_every_module_that_uses_it() -> None:
    from hf_divguard.core.detection import baseline, level

    assert baseline.PATIENCE == level.PATIENCE
    with moved("PATIENCE", 1.25) as after:
        assert baseline.PATIENCE == level.PATIENCE == after == 12
    assert baseline.PATIENCE == level.PATIENCE == 9
