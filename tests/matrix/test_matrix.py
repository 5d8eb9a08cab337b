"""The table of compatibility: every feature on every kind of trainer, in one process and in two."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import features
from tests.matrix.features import FEATURES
from tests.matrix.kinds import KINDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # those of other libraries
]

IN_TWO_PROCESSES = ("Trainer", "Trainer, LoRA", "Seq2SeqTrainer", "SFTTrainer, LoRA", "DPOTrainer")


def skip_without(kind: str) -> None:
    for module in KINDS[kind].needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{kind} needs {module}; `make compat` runs it in an environment that has it")


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_one_process(
    kind: str, feature: str, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    skip_without(kind)
    record_property("cell", [kind, feature, 1])
    FEATURES[feature](KINDS[kind], tmp_path)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", IN_TWO_PROCESSES)
def test_in_two_processes(
    kind: str, feature: str, run_ranks: Any, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    skip_without(kind)
    record_property("cell", [kind, feature, 2])
    first, second = run_ranks(features.on_rank, 2, kind=kind, feature=feature, folder=tmp_path)
    assert first.check() == second.check()
