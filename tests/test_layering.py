"""The layers of the package: imports point down, and only ``hf`` knows torch and transformers. Nothing is too long."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_divguard"

CORE = ("hf_divguard.core", "hf_divguard.errors")
STORAGE = (*CORE, "hf_divguard.storage", "hf_divguard._version")
ALLOWED = {
    "_version.py": (),
    "errors.py": CORE,
    "core": CORE,
    "storage": STORAGE,
}
"""What each floor may import of the package; a floor that is not listed may import all of it."""

LIBRARIES = {"storage": ("xxhash", "filelock")}
"""What a floor below the host may import beside the standard library."""

HOST = ("torch", "transformers", "accelerate", "safetensors", "peft", "datasets", "numpy")


def imported_modules(source: str, *, when_running: bool = False) -> Iterator[str]:
    """Yield every module that ``source`` imports, in functions too, and unless ``when_running`` for type checkers."""
    tree = ast.parse(source)
    if when_running:
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def breaches(package: Path) -> list[str]:
    """Return the imports in ``package`` that point upwards or sideways, each with its file."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        floor = relative.parts[0]
        for module in imported_modules(path.read_text(encoding="utf-8")):
            root = module.split(".")[0]
            if root == "hf_divguard":
                allowed = ALLOWED.get(floor, ("hf_divguard",))
                is_fine = any(module == one or module.startswith(one + ".") for one in allowed)
            elif floor in ALLOWED:
                is_fine = root in sys.stdlib_module_names or root in LIBRARIES.get(floor, ())
            else:
                is_fine = floor == "hf" or root not in HOST
            if not is_fine:
                found.append(f"{relative.as_posix()} imports {module or 'a sibling by a relative import'}")
    return found


def test_every_import_points_down() -> None:
    """Core needs the standard library, storage adds files, and only ``hf`` knows the host."""
    assert breaches(PACKAGE) == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("core/rule.py", "import torch"),
        ("core/rule.py", "from hf_divguard.storage.names import MANIFEST_NAME"),
        ("core/rule.py", "from ..storage import names"),
        ("core/deep/rule.py", "def late():\n    import numpy.linalg"),
        ("storage/files.py", "from hf_divguard.hf.trainer import DivGuardTrainer"),
        ("storage/files.py", "import safetensors"),
        ("errors.py", "import hf_divguard.storage.names"),
        ("replay.py", "from transformers import Trainer"),
        ("__init__.py", "import torch.nn"),
    ],
)
def test_an_import_that_points_up_is_noticed(tmp_path: Path, where: str, line: str) -> None:
    """The check above can fail: each of these breaks a wall."""
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line, encoding="utf-8")
    assert len(breaches(tmp_path)) == 1


def test_imports_that_point_down_are_not_noticed(tmp_path: Path) -> None:
    """The check above does not fail for everything."""
    for where, line in {
        "core/rule.py": "import math\nfrom hf_divguard.core.findings import Finding",
        "storage/files.py": "import os.path\nfrom hf_divguard.core.retention import rank",
        "hf/trainer.py": "import torch\nfrom hf_divguard.storage.names import MANIFEST_NAME",
        "replay.py": "import json\nfrom hf_divguard.storage.names import MANIFEST_NAME",
    }.items():
        (tmp_path / where).parent.mkdir(exist_ok=True)
        (tmp_path / where).write_text(line, encoding="utf-8")
    assert breaches(tmp_path) == []


# ---- inside hf

HF = "hf_divguard.hf."
COMPONENTS = ("losses", "evaluation", "saving", "rollback", "callbacks", "detectors", "reports")
"""The parts that a run brings together. None of them knows the trainer or the run."""

PRIVATE_MEMBER = re.compile(r"(?:trainer|host)\._[a-z]|super\(\)\._[a-z]")
CONTROL_SWITCH = re.compile(r"control\.should_[a-z_]+ *(?:=[^=]|\|=)")
MAY_NAME_PRIVATE_MEMBERS = {"hf/host.py", "hf/trainer.py"}
MAY_SET_CONTROL = {"hf/control.py"}


def sources(package: Path) -> Iterator[tuple[str, str]]:
    """Yield the path of every module, relative to the package, and its source."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")


def components_that_know_the_run(package: Path) -> list[str]:
    """Return the modules below the run that import the trainer or the run."""
    above = (HF + "trainer", HF + "run")
    return [
        name
        for name, source in sources(package)
        if name.startswith("hf/")
        and name not in ("hf/trainer.py", "hf/public_methods.py", "hf/run.py", "hf/guard.py")
        for module in imported_modules(source, when_running=True)
        if module in above
    ]


def matches_outside(package: Path, pattern: re.Pattern[str], allowed: set[str]) -> list[str]:
    """Return the modules with code that matches ``pattern`` and are not ``allowed`` to."""
    return [name for name, source in sources(package) if name not in allowed and pattern.search(source)]


def names_of_hf_in_core(package: Path) -> list[str]:
    """Return the classes of ``hf`` that a module of ``core`` names, with the module."""
    classes = {
        node.name
        for name, source in sources(package)
        if name.startswith("hf/")
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
    return [
        f"{name} names {word}"
        for name, source in sources(package)
        if name.startswith("core/")
        for word in sorted(set(re.findall(r"[A-Za-z_]+", source)) & classes)
    ]


def test_components_know_neither_trainer_nor_run() -> None:
    assert components_that_know_the_run(PACKAGE) == []


def test_private_members_of_the_host_are_named_in_two_files() -> None:
    assert matches_outside(PACKAGE, PRIVATE_MEMBER, MAY_NAME_PRIVATE_MEMBERS) == []


def test_the_control_is_set_in_one_file() -> None:
    assert matches_outside(PACKAGE, CONTROL_SWITCH, MAY_SET_CONTROL) == []


def test_the_core_knows_no_name_of_hf() -> None:
    assert names_of_hf_in_core(PACKAGE) == []


@pytest.mark.parametrize(
    ("where", "line", "check"),
    [
        ("hf/saving.py", "from hf_divguard.hf.run import GuardedRun", components_that_know_the_run),
        ("hf/rollback.py", "def f():\n    import hf_divguard.hf.trainer", components_that_know_the_run),
        (
            "hf/saving.py",
            "step = host._globalstep_last_logged",
            lambda package: matches_outside(package, PRIVATE_MEMBER, MAY_NAME_PRIVATE_MEMBERS),
        ),
        (
            "hf/losses.py",
            "super()._save_checkpoint(model)",
            lambda package: matches_outside(package, PRIVATE_MEMBER, MAY_NAME_PRIVATE_MEMBERS),
        ),
        (
            "hf/detectors.py",
            "control.should_save = False",
            lambda package: matches_outside(package, CONTROL_SWITCH, MAY_SET_CONTROL),
        ),
        (
            "core/registry.py",
            '"""Used by Guard."""',
            lambda package: names_of_hf_in_core(package),
        ),
    ],
    ids=["run", "trainer", "private member", "private override", "control", "name of hf"],
)
def test_a_breach_inside_hf_is_noticed(tmp_path: Path, where: str, line: str, check: Any) -> None:
    """Each of the checks above can fail."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "guard.py").write_text("class Guard:\n    pass\n", encoding="utf-8")
    assert check(tmp_path) == []
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(line, encoding="utf-8")
    assert len(check(tmp_path)) == 1


# ---- length

LONGEST_FILE = 350
LONGEST_BODY = 40
LONG_BODIES = {
    "core/rollback/policy.py decide": "one decision from top to bottom: each line narrows what the line above it left",
}
"""The functions whose body may be longer, each with the reason."""


def long_files(package: Path) -> list[str]:
    """Return the modules of more than ``LONGEST_FILE`` lines."""
    return [name for name, source in sources(package) if len(source.splitlines()) > LONGEST_FILE]


def long_bodies(package: Path) -> list[str]:
    """Return the functions of which more than ``LONGEST_BODY`` lines are left without head and docstring."""
    return [
        f"{name} {node.name}"
        for name, source in sources(package)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and body_lines(node) > LONGEST_BODY
        and f"{name} {node.name}" not in LONG_BODIES
    ]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines the body of a function has, comments and blank lines included."""
    body = function.body if ast.get_docstring(function) is None else function.body[1:]
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_no_file_is_too_long() -> None:
    assert long_files(PACKAGE) == []


def test_no_function_is_too_long_without_a_reason() -> None:
    assert long_bodies(PACKAGE) == []


def test_each_reason_for_a_long_function_is_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    named = sorted(LONG_BODIES)
    monkeypatch.setattr(sys.modules[__name__], "LONG_BODIES", {})
    assert long_bodies(PACKAGE) == named


@pytest.mark.parametrize("head", ["def f():", "async def f():", "class A:\n  def f(self):"])
def test_a_function_that_is_too_long_is_noticed(tmp_path: Path, head: str) -> None:
    """The check can fail, wherever the function stands; head and docstring do not count."""
    lines = [head, '    """What it does.', "", '    More of it."""', *["    pass"] * LONGEST_BODY]
    path = tmp_path / "module.py"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert long_bodies(tmp_path) == []
    path.write_text("\n".join([*lines, "    # one more", "    pass"]), encoding="utf-8")
    assert long_bodies(tmp_path) == ["module.py f"]


def test_a_file_that_is_too_long_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("pass\n" * LONGEST_FILE, encoding="utf-8")
    assert long_files(tmp_path) == []
    (tmp_path / "module.py").write_text("pass\n" * (LONGEST_FILE + 1), encoding="utf-8")
    assert long_files(tmp_path) == ["module.py"]
