"""Writes the reference pages of the documentation from the code: options, API, command line, messages."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import hf_divguard

NOTE = "This page is generated from the code.\n"

API = {
    "Training": (
        "DivGuardTrainer",
        "DivGuardTrainingArguments",
        "guard",
        "DivGuardMixin",
        "DivGuardArgumentsMixin",
        "exit_on_divergence",
    ),
    "Detectors": (
        "AdaptiveDivergenceDetector",
        "NonFiniteDetector",
        "DualTimeScaleDivergenceDetector",
        "DualWindowDivergenceDetector",
        "DivergenceDetector",
        "Finding",
        "replay",
    ),
    "Checkpoints": (
        "find_checkpoints",
        "best_checkpoints",
        "latest_complete_checkpoint",
        "verify_checkpoint",
        "Checkpoint",
        "Verdict",
    ),
}
"""The names of the package by subject; errors follow, then what is listed nowhere."""


# ---- API


def api_page() -> str:
    """Return a page with the docstring of every public name."""
    errors = [name for name in hf_divguard.__all__ if name.endswith("Error")]
    groups = {**API, "Errors": tuple(errors)}
    listed = {name for names in groups.values() for name in names} | {"__version__"}
    groups["More"] = tuple(name for name in hf_divguard.__all__ if name not in listed)
    parts = ["# API\n", NOTE]
    for title, names in groups.items():
        if names:
            parts += [f"## {title}\n", *(directive_of(name) for name in names)]
    return "\n".join(parts)


def directive_of(name: str) -> str:
    """Return the directive that documents one name."""
    thing = getattr(hf_divguard, name)
    kind = "class" if inspect.isclass(thing) else "function"
    signature, options = "", [] if kind == "function" else [":members:", ":show-inheritance:"]
    if kind == "class" and "TrainingArguments" in name:
        signature = "(output_dir, **options)"
    if kind == "class" and issubclass(thing, Exception):
        options = [":show-inheritance:"]
    lines = [f".. auto{kind}:: hf_divguard.{name}{signature}", *(f"   {option}" for option in options)]
    return "```{eval-rst}\n" + "\n".join(lines) + "\n```\n"


# ---- options


def options_page() -> str:
    """Return a page with the help text of every option, by group."""
    from hf_divguard.hf.arguments import _GROUPS, DivGuardArgumentsMixin

    parts = [
        "# Options\n",
        NOTE,
        "[Options in detail](../arguments.md) says more on each, and which exclude others.\n",
    ]
    owners = {entry.name: group for group in _GROUPS for entry in fields(group)}
    for group in dict.fromkeys(_GROUPS):
        parts.append(f"## {plain(inspect.getdoc(group) or '').rstrip('.')}\n")
        for entry in fields(DivGuardArgumentsMixin):
            if owners.get(entry.name) is group:
                parts.append(
                    f"### `--{entry.name}`\n\n{plain(entry.metadata['help'])} Default: `{default_of(entry)}`.\n"
                )
    return "\n".join(parts)


def default_of(entry: Any) -> str:
    """Return the default of a field as a command line has it."""
    if entry.default is MISSING:
        return "none"
    return "none" if entry.default is None else str(entry.default).lower()


def plain(text: str) -> str:
    """Return a help text as one paragraph of Markdown."""
    return re.sub(r"\s+", " ", text.replace("%%", "%").replace("``", "`")).replace("<", "&lt;").strip()


# ---- command line


def command_line_page() -> str:
    """Return a page with the help of ``hf-divguard`` and of each command."""
    from hf_divguard.cli.parsers import COMMANDS, add_commands

    parser = argparse.ArgumentParser(prog="hf-divguard")
    add_commands(parser)
    [commands] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    parts = [
        "# Help of the command line\n",
        NOTE,
        "[Command line](../command-line.md) describes the commands.\n",
    ]
    for name in COMMANDS:
        parts.append(f"## {name}\n\n```text\n{commands.choices[name].format_help().strip()}\n```\n")
    return "\n".join(parts)


# ---- exit codes and files


def exit_codes_page() -> str:
    """Return a page with the exit codes of training scripts and of the command."""
    from hf_divguard.cli import exits

    documented = {
        **attribute_docs(Path(inspect.getfile(hf_divguard)).parent / "errors.py"),
        **attribute_docs(Path(exits.__file__)),
    }
    from hf_divguard import errors

    rows = []
    for name, text in documented.items():
        value = getattr(errors, name, getattr(exits, name, None))
        if isinstance(value, int):
            where = "training script" if name.endswith("_EXIT_CODE") else "`hf-divguard`"
            rows.append((value, where, plain(text)))
    lines = [f"| {value} | {where} | {text} |" for value, where, text in sorted(rows)]
    table = "| code | of | meaning |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    return "\n".join(["# Exit codes\n", NOTE, table])


def attribute_docs(path: Path) -> dict[str, str]:
    """Return the strings below the constants of a module."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {
        before.targets[0].id: after.value.value
        for before, after in pairwise(body)
        if isinstance(before, ast.Assign)
        and isinstance(before.targets[0], ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


# ---- messages


def messages_page() -> str:
    """Return a page with every warning and error of the package, as its template."""
    package = Path(hf_divguard.__file__).parent
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(package.rglob("*.py")):
        for kind, text in messages_of(path):
            found.setdefault(kind, []).append((path.relative_to(package).as_posix(), text))
    parts = [
        "# Messages\n",
        NOTE,
        "Every warning and error, with `…` for the values that are filled in. Each says what must hold, what was "
        "found and what to do.\n",
    ]
    for kind in sorted(found, key=lambda kind: (kind != "warning", kind)):
        rows = "\n".join(f"| {escaped(text)} | `{where}` |" for where, text in found[kind])
        parts.append(f"## {kind}\n\n| message | from |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def messages_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the kind and the template of every message that a module logs or raises as a literal."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = ast.unparse(call.func).split(".")[-1]
        is_raise = isinstance(node, ast.Raise) and name.endswith("Error")
        is_warning = not isinstance(node, ast.Raise) and ast.unparse(call.func) in (
            "logger.warning",
            "warnings.warn",
        )
        text = template_of(call.args[0]) if is_raise or is_warning else ""
        if len(text.replace("…", "").split()) > 3:
            yield ("warning" if is_warning else name), text


def template_of(node: ast.expr) -> str:
    """Return the text of a literal or an f-string, with a dot leader for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-.\d]*[sdrfg]", "…", node.value).replace("%%", "%")
    if isinstance(node, ast.JoinedStr):
        return "".join(template_of(each) if isinstance(each, ast.Constant) else "…" for each in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template_of(node.left) + template_of(node.right)
    return "…"


def escaped(text: str) -> str:
    """Return a message as the cell of a table."""
    return (
        re.sub(r"\s+", " ", text)
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("*", "\\*")
        .replace("_", "\\_")
        if ("`" not in text)
        else re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
    )


# ---- files


def file_formats_page() -> str:
    """Return a page with a sidecar, a manifest and an outcome file as the code writes them."""
    from hf_divguard.storage import outcome_file, record

    fields_of_end = {entry.name: str(entry.type) for entry in fields(outcome_file.RunEnd)}
    doc = inspect.getdoc(outcome_file.RunEnd) or ""
    return "\n".join(
        [
            "# File formats\n",
            NOTE,
            f"The sidecar and the manifest have the format {record.FORMAT_VERSION}, the outcome file has version "
            f"{outcome_file._VERSION}. A file of a newer format is not read, and says so. "
            "[Checkpoints](../checkpoints.md#what-is-in-a-checkpoint) lists the fields of sidecar and manifest.\n",
            "## `divguard/outcome.json`\n",
            "```json\n" + json.dumps(fields_of_end, indent=2) + "\n```\n",
            "```text\n" + doc + "\n```\n",
        ]
    )


PAGES = {
    "api": api_page,
    "options": options_page,
    "command-line": command_line_page,
    "exit-codes": exit_codes_page,
    "file-formats": file_formats_page,
    "messages": messages_page,
}
"""The generated pages."""


def write_pages(folder: Path) -> None:
    """Write every page into ``folder``; a page that has not changed is left as it is."""
    folder.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        path, text = folder / f"{name}.md", page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
