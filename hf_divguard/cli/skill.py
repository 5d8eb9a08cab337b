"""The command ``skill``: prints how a coding agent reads a run and what it does about each outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_divguard.cli.exits import OK
from hf_divguard.cli.output import print_json

__all__ = ["run_skill", "skill_text"]


def skill_text() -> str:
    """Return the skill file."""
    return Path(__file__).with_name("skill.md").read_text(encoding="utf-8")


def run_skill(options: Any) -> int:
    """Print the skill file."""
    if options.json:
        print_json("skill", {"text": skill_text()})
    else:
        print(skill_text(), end="")
    return OK
