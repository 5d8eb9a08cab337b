"""Real checkpoints, written once by the stock Trainer, and copies of them to break."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_divguard.storage.checkpoints import Verdict
from hf_divguard.storage.manifest import build_manifest, write_manifest
from hf_divguard.storage.sidecar import CheckpointRecord, Sidecar, write_sidecar
from tests.processes import run_python


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs ``full``, ``only_model`` and ``adapter``, checkpoints 2 and 4 in each."""
    root = tmp_path_factory.mktemp("trained")
    done = run_python("-W", "ignore", "-m", "tests.storage.train_tiny", root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run ``full``, to break."""
    return Path(shutil.copytree(trained / "full", tmp_path / "run"))


def certify(folder: Path, *, sequence: int = 1, checksums: bool = False, **options: object) -> Path:
    """Add a sidecar and a manifest to the checkpoint in ``folder``."""
    step = int(folder.name.rpartition("-")[2])
    sidecar = sidecar_of(step, sequence=sequence, **options)
    write_sidecar(folder, sidecar)
    write_manifest(
        folder,
        build_manifest(
            folder,
            step=step,
            run_id=sidecar.run_id,
            sequence=sequence,
            metric_name=sidecar.metric_name,
            metric=sidecar.metric,
            greater_is_better=sidecar.greater_is_better,
            world_size=max(1, len(list(folder.glob("rng_state_*.pth")))),
            checksums=checksums,
        ),
    )
    return folder


def sidecar_of(step: int, **options: object) -> Sidecar:
    values = {"run_id": "run", "sequence": 1, "manifest_expected": True, **options}
    return Sidecar(step=step, **values)


def records_of(*steps: int, **metrics: float) -> tuple[CheckpointRecord, ...]:
    return tuple(
        CheckpointRecord(step, place, metrics.get(f"m{step}")) for place, step in enumerate(steps, start=1)
    )


def small_checkpoint(folder: Path, *, weight: bytes = b"weights") -> Path:
    """Write a folder that only a manifest can judge, fast to make in great number."""
    folder.mkdir(parents=True)
    (folder / "weights.dat").write_bytes(weight)
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": int(folder.name.rpartition("-")[2])})
    )
    return folder


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Return what stands below ``root``: kind, mode, contents and time of change of everything."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = os.lstat(path)
            content: object = None
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            found[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def damages() -> dict[str, Callable[[Path], None]]:
    """Return the ways in which a file is broken, by name."""

    def halve(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return {
        "removed": os.unlink,
        "emptied": lambda path: os.truncate(path, 0),
        "halved": halve,
        "bit flipped": flip,
    }


def said(verdict: Verdict) -> str:
    return " ".join((verdict.reason, *verdict.problems))
