"""Run notebooks from top to bottom in a clean kernel.

    python notebooks/execute.py notebooks/*.ipynb            # check them
    python notebooks/execute.py --store notebooks/*.ipynb    # check them, and store their outputs

A notebook runs in an empty folder that is removed afterwards. The first cell that raises ends
it, with its traceback and exit code 1. Committed notebooks hold the outputs of a run, so that
they can be read without running them; a notebook without outputs is an error.
"""

from __future__ import annotations

import argparse
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
    """Return whether a notebook was saved with the outputs of a run."""
    return any(cell.get("outputs") for cell in notebook.cells)


def execute(path: Path, *, store: bool) -> str | None:
    """Run one notebook; return what failed, ``None`` if nothing did.

    Args:
        path: The notebook.
        store: Whether its file gets the outputs of this run.
    """
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    if not store and not holds_outputs(notebook):
        return "it has no outputs; run this script with --store before committing"
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        try:
            client.execute()
        except CellExecutionError as error:
            return str(error)
    if store:
        if sys.prefix in nbformat.writes(notebook):
            return f"its outputs hold a path of this machine ({sys.prefix})"
        notebook.metadata["language_info"] = {"name": "python"}  # not the version of this machine
        nbformat.write(notebook, path)
    return None


def main(arguments: list[str]) -> int:
    """Run the notebooks; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+", type=Path, help="the notebooks to run")
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    failed = 0
    for path in options.notebooks:
        started = time.monotonic()
        problem = execute(path, store=options.store)
        failed += problem is not None
        verdict = "ran" if problem is None else f"failed: {problem}"
        print(f"{path}: {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
