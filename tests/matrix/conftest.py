"""Records the outcome of every cell, if ``MATRIX_RESULTS`` names a file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest

from tests.hf.conftest import run_ranks  # noqa: F401

PACKAGES = ("transformers", "torch", "accelerate", "trl", "peft", "sentence-transformers")
_cells: list[list[Any]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    cell = dict(report.user_properties).get("cell")
    if cell is not None and report.when == "call":
        _cells.append([*cell, report.outcome])


def pytest_sessionfinish() -> None:
    path = os.environ.get("MATRIX_RESULTS")
    if not path or not _cells:
        return
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    Path(path).write_text(
        json.dumps({"versions": versions, "cells": _cells}, indent=1) + "\n", encoding="utf-8"
    )
