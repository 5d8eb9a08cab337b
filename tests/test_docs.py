"""The documentation agrees with the code: options, commands, files and links."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from hf_divguard import DivGuardArgumentsMixin, DivGuardTrainingArguments

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
REFERENCE = (PROJECT / "docs" / "arguments.md").read_text(encoding="utf-8")
MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")
PAGES = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")])
OPTIONS = fields(DivGuardArgumentsMixin)


def described_defaults(page: str) -> dict[str, str]:
    """Return the options in the tables of a page, each with the default the table gives."""
    tables = re.findall(r"^\| option \| default \|.*\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", "".join(tables), flags=re.MULTILINE)
    return {name: default.strip().strip("`") for name, default in rows}


def code_blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [README, REFERENCE], ids=["README", "arguments"])
def test_every_option_is_described_with_its_default(page: str) -> None:
    """The tables hold every field that the arguments add, with its default, and no other."""
    assert described_defaults(page) == {
        option.name: "none" if option.default is None else str(option.default).lower() for option in OPTIONS
    }


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_says_what_it_does(option: object) -> None:
    """Each field has a help text of at least a sentence."""
    assert option.metadata["help"].endswith((".", ").")), option  # type: ignore[attr-defined]


def make_targets() -> set[str]:
    """Return the targets of the Makefile that say what they do."""
    return set(re.findall(r"^([a-z-]+):.*## \S", MAKEFILE, flags=re.MULTILINE))


def test_every_command_of_make_that_a_page_names_exists() -> None:
    """No page sends a reader to a target that is not there."""
    named = {
        (page.name, target)
        for page in PAGES
        for target in re.findall(
            r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    }
    assert ("README.md", "demo") in named
    assert ("README.md", "test") in named
    assert {target for _, target in named} <= make_targets()


def test_every_target_of_make_says_what_it_does() -> None:
    """``make`` alone lists every target."""
    listed = re.search(r"^\.PHONY: (.*?[^\\])\n", MAKEFILE, flags=re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert set(listed[1].replace("\\\n", " ").split()) == make_targets()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    """Links and pictures point at files of the project."""
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_python_block_is_python(page: Path) -> None:
    """The code on the pages parses, and its imports from the package work."""
    for block in code_blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hf_divguard"):
                module = __import__(str(node.module), fromlist=["_"])
                assert all(hasattr(module, alias.name) for alias in node.names), block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_flag_on_a_command_line_is_known(page: Path) -> None:
    """Command lines of the example script use flags that it takes, with values that it accepts."""
    parser = HfArgumentParser(DivGuardTrainingArguments)
    for block in code_blocks(page.read_text(encoding="utf-8"), "bash"):
        for command in block.replace("\\\n", " ").splitlines():
            if "train_lm.py" in command:
                words = command.split("train_lm.py", 1)[1].replace("'", "").split()
                _, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
                assert [word for word in unknown if word.startswith("--")] == [], command
