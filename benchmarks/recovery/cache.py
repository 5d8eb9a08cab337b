"""Outcomes of runs on disk, one JSON object a line, so that nothing is trained twice.

A stock or oracle run is kept until the benchmark itself changes, a guarded one until the package changes too: then
the keys differ, and the runs are made again. Weights are compared bit by bit, so a folder belongs to one machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.recovery.cells import Cell
from benchmarks.recovery.oracle import skipped_by_oracle

HERE = Path(__file__).parent
SHAPES_RUNS = ("data", "models", "faults", "objectives", "oracle", "cells", "runs")


def _digest(paths: Iterable[Path], *words: str) -> str:
    found = hashlib.sha256("|".join(words).encode())
    for path in paths:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


@lru_cache(maxsize=1)
def benchmark_digest() -> str:
    """Return a digest of what shapes a run, the libraries included."""
    paths = [HERE / f"{name}.py" for name in SHAPES_RUNS]
    return _digest(paths, torch.__version__, transformers.__version__)


@lru_cache(maxsize=1)
def package_digest() -> str:
    """Return a digest of the package that is judged."""
    spec = importlib.util.find_spec("hf_divguard")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "hf_divguard must be importable to judge it: run from the root of the project."
        )
    return _digest(sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")))


def key_of(cell: Cell, variant: str, options: dict[str, Any]) -> str:
    """Return what identifies a run; oracles are shared by all faults that make the same updates bad."""
    if variant == "oracle" and cell.fault is not None:
        skipped = skipped_by_oracle(cell.fault, cell.bad_steps)
        name = f"{cell.task}|clips={cell.fault.clips}|skips={','.join(map(str, skipped))}"
    else:
        name = f"{cell.name}|{_content(cell)}"
    parts = [variant, name, f"seed={cell.seed}", benchmark_digest()]
    if variant in ("rollback", "stop"):
        parts += [package_digest(), json.dumps(options, sort_keys=True)]
    return "|".join(parts)


def _content(cell: Cell) -> str:
    """Return a digest of the source of the kind, so that a changed kind is run again and the others are not."""
    if cell.group == "fault":
        return ",".join(map(str, cell.bad_steps))
    return _digest([HERE / ("switches.py" if cell.group == "switch" else "healthy.py")])


class Cache:
    """Outcomes by key.

    Args:
        folder: Gets ``runs.jsonl``; made when it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "runs.jsonl"
        self.outcomes: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # a line that a killed benchmark did not finish
                self.outcomes[entry["key"]] = entry["outcome"]

    def __contains__(self, key: str) -> bool:
        return key in self.outcomes

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.outcomes[key]

    def add(self, key: str, outcome: dict[str, Any]) -> None:
        """Keep an outcome and write it at once."""
        self.outcomes[key] = outcome
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "outcome": outcome}) + "\n")
