"""Runs of tiny models, made once, and the command line as a user calls it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.cli.main import main
from tests.processes import run_python

OLD = 86_400.0


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs of ``make_runs.py``, a day old."""
    root = tmp_path_factory.mktemp("made")
    done = run_python("-W", "ignore", "-m", "tests.cli.make_runs", root)
    assert done.returncode == 0, done.stderr[-3000:]
    let_age(root, OLD)
    return root


def let_age(root: Path, seconds: float) -> None:
    """Move the times of everything below ``root`` into the past; their distances stay."""
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds), follow_symlinks=False)


@pytest.fixture
def run_of(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a run by its name, to break it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(made / name, tmp_path / name, symlinks=True))

    return copy


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object that was printed; nothing else may be."""

        def refuse(token: str) -> float:
            raise AssertionError(f"{token} is not strict JSON")

        return json.loads(self.out, parse_constant=refuse)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Return a function that runs one command in this process."""

    def call(*words: object) -> Answer:
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit_:  # only --help and --version end this way
            code = int(exit_.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Answer(code, out, err)

    return call


def write_events(folder: Path, *events: dict[str, Any]) -> None:
    """Write lines of events as they are, sound or not."""
    (folder / "divguard").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"run_id": "run", "time": time.time(), **event}) + "\n" for event in events)
    (folder / "divguard" / "events.jsonl").write_text(text)
