"""Run the tests of rules, policies and histories with other Pythons: they need no PyTorch, so that it takes seconds.

    python tests/pythons.py 3.10 3.13

A version that is not installed is named and left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "matrix"))
from environments import find_python

PROJECT = Path(__file__).parents[1]
PACKAGES = ("pytest>=8", "hypothesis>=6.100", "filelock>=3.30", "xxhash>=3.0", "numpy")
# The settings of conftest.py are those of tests with PyTorch.
COMMAND = ("-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", "-m", "not slow")
TESTS = ("tests/core", "tests/test_replay.py")


def run(version: str) -> int:
    """Run the tests with one Python; return the exit code, 0 where it is not installed."""
    base = find_python(version)
    if base is None:
        print(f"Python {version} is not installed: not run.", flush=True)
        return 0
    folder = PROJECT / ".compat" / f"core-{version}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
        pip = (str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check")
        subprocess.run([*pip, *PACKAGES], check=True)
        (folder / "ready").touch()
    print(f"Python {version}:", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run([str(python), *COMMAND, *TESTS], cwd=PROJECT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(max(run(version) for version in sys.argv[1:]))
