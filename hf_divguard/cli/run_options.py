"""The options that ``hf-divguard run`` takes, known without importing torch or transformers."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hf_divguard.cli.exits import USAGE, CommandError
from hf_divguard.core.detection.registry import RULES, make_rule
from hf_divguard.core.outcome import check_action

__all__ = ["known_options", "options_from_file", "options_from_words"]

_CLASS = "DivGuardArgumentsMixin"
_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


@cache
def known_options() -> dict[str, str]:
    """Return the types of all options by name, as written in the source of the arguments."""
    spec = importlib.util.find_spec("hf_divguard")
    folder = Path(str(spec.origin if spec else "")).parent / "hf"
    classes: dict[str, ast.ClassDef] = {}
    for path in (folder / "arguments.py", *sorted((folder / "options").glob("*.py"))):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return _fields_of(classes[_CLASS], classes)


def _fields_of(owner: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> dict[str, str]:
    """Return the types of the fields of a dataclass, those of its bases first, from the last to the first."""
    found: dict[str, str] = {}
    for base in reversed(owner.bases):
        if isinstance(base, ast.Name) and base.id in classes:
            found |= _fields_of(classes[base.id], classes)
    for node in owner.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = ast.unparse(node.annotation)
    return found


def options_from_words(words: Sequence[str]) -> dict[str, Any]:
    """Return the options on a command line: `--name value`, `--name=value`, or `--name` alone for a switch."""
    options: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            raise CommandError(
                f"Put `--` before the command, got {word!r}: hf-divguard run [OPTION ...] -- python train.py",
                USAGE,
            )
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        kind = _kind_of(name)
        if not equals:
            if waiting and not waiting[0].startswith("--"):
                value = waiting.pop(0)
            elif kind == "bool":
                value = "true"
            else:
                raise CommandError(f"`--{name}` needs a value.", USAGE)
        options[name] = _converted(name, value, kind)
    return options


def options_from_file(path: str) -> dict[str, Any]:
    """Return the options in a YAML or JSON file: a mapping of names to values."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    try:
        content = json.loads(text)
    except ValueError:
        content = _yaml(path, text)
    if not isinstance(content, Mapping):
        raise CommandError(f"`{path}` must hold a mapping of options to values.", USAGE)
    return {str(name): _converted(str(name), value, _kind_of(str(name))) for name, value in content.items()}


def _yaml(path: str, text: str) -> Any:
    import yaml  # type: ignore[import-untyped, unused-ignore]

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CommandError(f"`{path}` is neither YAML nor JSON: {error}", USAGE) from None


def _kind_of(name: str) -> str:
    known = known_options()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean `--{close[0]}`?" if close else f" There are: {', '.join(known)}."
        raise CommandError(f"There is no option `--{name}`.{hint}", USAGE)
    return known[name]


def _converted(name: str, value: Any, kind: str) -> Any:
    """Return ``value`` as the type of its option."""
    try:
        if kind == "bool":
            word = str(value).lower()
            if word not in _TRUE + _FALSE:
                raise ValueError("true or false")
            return word in _TRUE
        if kind.startswith(("int", "float")) and isinstance(value, bool):
            raise ValueError("a number")
        if kind == "int | None" and str(value).lower() in ("none", "null"):
            return None
        if kind in ("int", "int | None"):
            return int(str(value))
        if kind == "float":
            return float(value)
        if "dict" in kind and isinstance(value, str):
            value = json.loads(value)
    except (ValueError, TypeError):
        kinds = {"bool": "true or false", "int": "a whole number", "float": "a number"}
        wanted = kinds.get(kind.removesuffix(" | None"), "JSON")
        raise CommandError(f"`--{name}` must be {wanted}, got {value!r}.", USAGE) from None
    return value


def check_detector(options: Mapping[str, Any]) -> None:
    """Raise a ``CommandError`` if detector, action or settings are not known, before the script starts."""
    try:
        if "divguard_action" in options:
            check_action(options["divguard_action"])
        detector = options["divguard_detector"]
        if detector != "none":
            settings = options.get("divguard_detector_kwargs") or {}
            make_rule(detector, metric_key=options.get("divguard_metric_key") or "loss", **settings)
    except (TypeError, ValueError) as error:
        text = str(error).replace("`action`", "`--divguard_action`")
        raise CommandError(text if detector_known(options) else f"{text} Or `none`.", USAGE) from None


def detector_known(options: Mapping[str, Any]) -> bool:
    """Return whether the named detector exists."""
    return options.get("divguard_detector") in RULES
