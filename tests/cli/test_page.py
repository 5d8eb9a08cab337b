"""``docs/command-line.md`` and the command agree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.cli.main import make_parser
from hf_divguard.cli.parsers import COMMANDS
from hf_divguard.cli.run_options import options_from_words

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL))
LINES = re.findall(r"\bhf-divguard ((?:%s)\b[^\n\"#|>]*)" % "|".join(COMMANDS), BLOCKS)  # noqa: UP031
FIELDS = dict(re.findall(r"^\| `(\w+)` \| (`.*) \|$", PAGE.split("## Output")[1], flags=re.MULTILINE))


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_on_the_page_is_understood(line: str) -> None:
    words = shlex.split(line)
    own = words[: words.index("--")] if "--" in words else words
    _, rest = make_parser().parse_known_args(own)
    if own[0] == "run":
        options_from_words(rest)
    else:
        assert rest == []


def test_the_page_shows_every_command() -> None:
    assert {line.split()[0] for line in LINES} == set(COMMANDS)


@pytest.mark.parametrize(
    "command", ["status", "list", "best", "latest", "verify", "replay", "prune", "tune", "compare", "watch"]
)
def test_every_json_field_is_on_the_page(cli: Any, made: Path, command: str) -> None:
    """Those of the objects inside, too."""
    named = set(re.findall(r"`(\w+)`", FIELDS[command]))
    found: set[str] = set()

    def collect(value: Any, level: int = 0) -> None:
        if isinstance(value, dict):
            found.update(value)
            for key, each in value.items():
                if key not in ("first_error", "findings", "prune", "kwargs", "events") and (
                    key,
                    command,
                ) not in (
                    ("checkpoints", "status"),
                    ("settings", "replay"),
                ):
                    collect(each, level + 1)
        elif isinstance(value, list):
            for each in value:
                collect(each, level + 1)

    for run in ("stopped", "stock"):
        collect(cli(command, made / run, "--json").json)
    assert found - {"schema", "command"} <= named
    assert found - {"schema", "command"}
