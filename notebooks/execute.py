"""Run notebooks from top to bottom in a clean kernel and throw the results away.

    python notebooks/execute.py notebooks/*.ipynb

A notebook runs in an empty folder that is removed afterwards. The first cell that raises ends
it, with its traceback and exit code 1. Committed notebooks must hold no outputs; one that does
is refused.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_TIMEOUT_SECONDS = 300


def holds_outputs(notebook: nbformat.NotebookNode) -> bool:
    """Return whether a notebook was saved with the results of a run."""
    return any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def execute(path: Path) -> str | None:
    """Run one notebook; return what went wrong, ``None`` if nothing did."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    if holds_outputs(notebook):
        return "it was saved with outputs; clear them before committing"
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        )
        try:
            client.execute()
        except CellExecutionError as error:
            return str(error)
    return None


def main(paths: list[str]) -> int:
    """Run the notebooks; return the exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    failed = 0
    for path in map(Path, paths):
        started = time.monotonic()
        problem = execute(path)
        failed += problem is not None
        verdict = "ran" if problem is None else f"failed: {problem}"
        print(f"{path}: {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
