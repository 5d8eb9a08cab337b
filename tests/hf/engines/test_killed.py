"""One rank of a sharded run is killed: the others end, and the run is resumed as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import find_checkpoints
from tests.hf.engines import killed
from tests.hf.engines.launch import NEEDS_TRANSFORMERS_5

pytestmark = [pytest.mark.slow, NEEDS_TRANSFORMERS_5]

PATIENCE = 30.0


@pytest.fixture(scope="module")
def never_killed(
    run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """How the run ends on each rank if nothing kills it."""
    folder = tmp_path_factory.mktemp("never")
    return [each.check() for each in run_ranks(killed.train_or_resume, 2, folder=folder, engine="fsdp2")]


@pytest.mark.parametrize(
    ("moment", "bad_rank"), [(moment, number % 2) for number, moment in enumerate(killed.MOMENTS)]
)
def test_the_others_end_and_the_resumed_run_is_the_one_that_was_never_killed(
    moment: str,
    bad_rank: int,
    run_ranks: Callable[..., Any],
    tmp_path: Path,
    never_killed: list[dict[str, Any]],
) -> None:
    """In a save, in a rollback, on either rank; no checkpoint is broken."""
    how = {"moment": moment, "bad_rank": bad_rank, "count": 2 if "save" in moment else 1}
    if moment in ("rollback saved", "host wrote", "sealed"):
        how["count"] = 1
    outcomes = run_ranks(killed.train_or_resume, 2, folder=tmp_path, engine="fsdp2", **how)
    waited = time.time() - killed.when_killed(tmp_path)[0]
    assert outcomes[bad_rank].error == "it ended with -9"
    assert outcomes[1 - bad_rank].error not in (None, "it did not end in time"), outcomes[1 - bad_rank].log
    assert waited < PATIENCE
    complete = [each for each in find_checkpoints(tmp_path) if each.verdict.status == "complete"]
    assert all(each.verdict.resumable for each in complete)
    resumed = run_ranks(killed.train_or_resume, 2, folder=tmp_path, engine="fsdp2")
    assert [each.check() for each in resumed] == never_killed
