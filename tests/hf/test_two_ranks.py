"""Two processes of one training keep the same checkpoints and stop together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hf import scenarios
from tests.tiny import checkpoint_steps

BEST = {"preserve_best_model": True, "save_total_limit": 1}


@pytest.mark.parametrize("on_rank", [0, 1])
@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_nan_metric_on_one_rank_only_leaves_the_folders_that_rank_0_decides_on(
    run_ranks: Callable[..., Any], tmp_path: Path, on_rank: int, strategy: str
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": strategy}
    both = run_ranks(
        scenarios.rank_with_a_nan,
        2,
        output_dir=tmp_path / "both",
        on_rank=on_rank,
        timeout=90,
        **BEST,
        **options,
    )
    (alone,) = run_ranks(
        scenarios.rank_with_a_nan,
        output_dir=tmp_path / "alone",
        on_rank=0 if on_rank == 0 else -1,
        **BEST,
        **options,
    )
    first, second = (outcome.check() for outcome in both)
    assert first == second
    assert first["best"] == alone.check()["best"]
    # The scores are 1, 2, 0, 1 where they are not NaN; of equal ones, NaN included, the later step is kept.
    expected = {("steps", 1): {4, 8}, ("steps", 0): {8}, ("best", 1): {4}, ("best", 0): set()}
    assert checkpoint_steps(tmp_path / "both") == expected[strategy, on_rank]
    assert checkpoint_steps(tmp_path / "alone") == expected[strategy, on_rank]


@pytest.mark.parametrize("detector", ["ema", "window"])
@pytest.mark.parametrize("action", ["stop", "abort"])
def test_both_ranks_stop_at_the_same_step(
    run_ranks: Callable[..., Any], tmp_path: Path, detector: str, action: str
) -> None:
    settings = {
        "ema": {"short_alpha": 1.0, "threshold": 0.05},
        "window": {"short_window": 1, "long_window": 3},
    }
    first, second = (
        outcome.check()
        for outcome in run_ranks(
            scenarios.train,
            2,
            output_dir=tmp_path / "out",
            timeout=90,
            divguard_detector=detector,
            divguard_action=action,
            divguard_detector_kwargs={"threshold": 0.05, **settings[detector]},
            eval_strategy="steps",
            eval_steps=1,
            learning_rate=3.0,
            max_steps=20,
        )
    )
    assert first == second
    assert 1 < first["step"] < 20
    saved = checkpoint_steps(tmp_path / "out")
    assert (first["step"] in saved) is (action == "stop")


@pytest.mark.parametrize("on_rank", [0, 1])
@pytest.mark.parametrize("action", ["stop", "abort"])
def test_a_nan_metric_on_one_rank_only_stops_both_at_the_same_step(
    run_ranks: Callable[..., Any], tmp_path: Path, on_rank: int, action: str
) -> None:
    outcomes = run_ranks(
        scenarios.rank_with_a_nan,
        2,
        output_dir=tmp_path / "out",
        on_rank=on_rank,
        timeout=60,
        divguard_detector="ema",
        divguard_metric_key="eval_score",
        divguard_action=action,
        divguard_detector_kwargs={"threshold": 100.0},
        eval_strategy="steps",
        eval_steps=2,
    )
    first, second = (outcome.check() for outcome in outcomes)
    assert first == second
    assert first["step"] == 2
    assert checkpoint_steps(tmp_path / "out") == ({2} if action == "stop" else set())
    assert "`eval_score` = nan at step 2" in outcomes[0].log, "rank 0 says why"
