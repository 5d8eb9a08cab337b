"""The walls of the house: arrows point down, and only the floor of the host knows torch and transformers."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

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

LIBRARIES = {"storage": ("xxhash",)}
"""What a floor below the host may import beside the standard library."""

HOST = ("torch", "transformers", "accelerate", "safetensors", "peft", "datasets", "numpy")


def imported_modules(source: str) -> Iterator[str]:
    """Yield every module that ``source`` imports, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
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
        ("core/rule.py", "from ..storage import layout"),
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
