"""What a kill leaves on disk: every file is loaded and compared with a run that was never killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch

from hf_divguard.storage.checkpoints import find_checkpoints
from hf_divguard.storage.names import STAGING_NAME
from tests.processes import fork, wait_for

ANY_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")


def update_digest(digest: Any, value: Any) -> None:
    """Feed a loaded value to ``digest``, so that equal values give equal digests however they were stored."""
    if isinstance(value, torch.Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, numpy.ndarray):
        digest.update(f"array {value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            update_digest(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)}".encode())
        for entry in value:
            update_digest(digest, entry)
    else:
        digest.update(repr(value).encode())


def digests(folder: Path) -> dict[str, str]:
    """Load every file that a resume needs; return the digests of their values."""
    found = {}
    for path in sorted(folder.iterdir()):
        value: Any
        try:
            if path.suffix == ".safetensors":
                value = safetensors.torch.load_file(path)
            elif path.suffix in (".pt", ".pth"):
                value = torch.load(path, map_location="cpu", weights_only=False)
            elif path.name == "trainer_state.json":
                value = json.loads(path.read_text())["global_step"]
            elif path.name == "training_args.bin":
                value = type(torch.load(path, weights_only=False)).__mro__[-2].__name__
            elif path.name == "config.json":
                value = json.loads(path.read_text())
            else:
                continue
        except Exception:
            continue
        digest = hashlib.sha256()
        update_digest(digest, value)
        found[path.name] = digest.hexdigest()
    return found


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Steps after a kill: of all folders, of the complete ones, and of those that our reader finds complete."""

    folders: list[int]
    complete: list[int]
    staged_complete: list[int]
    counted: list[int]


def inspect(run_dir: Path, expected: dict[str, dict[str, str]]) -> Inspection:
    folders, complete, staged_complete = [], [], []
    for parent, found in ((run_dir, complete), (run_dir / STAGING_NAME, staged_complete)):
        for path in sorted(parent.glob("checkpoint-*")):
            match = ANY_CHECKPOINT.fullmatch(path.name)
            if match is None or not path.is_dir():
                continue
            if parent == run_dir:
                folders.append(int(match[1]))
            if digests(path) == expected[match[1]]:
                found.append(int(match[1]))
    counted = [info.step for info in find_checkpoints(run_dir) if info.verdict.status == "complete"]
    return Inspection(sorted(folders), sorted(complete), staged_complete, counted)


def ask_a_child(question: Callable[[], Any], log: Path) -> Any:
    """Return the answer of ``question`` from a fork, so that this process loads nothing."""
    reading, writing = os.pipe()

    def answer() -> None:
        with os.fdopen(writing, "w") as file:
            json.dump(question(), file)

    pid = fork(answer, log)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    wait_for(pid)
    if not text:
        raise RuntimeError(f"The inspection failed; see {log}.")
    return json.loads(text)
