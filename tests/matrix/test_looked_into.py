"""Trainers of TRL whose weights are compared on the way end as the stock ones, to the bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.matrix.kinds import KINDS, make
from tests.tiny import same_weights, weights

STEPS = 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["SFTTrainer", "SFTTrainer, packed", "DPOTrainer", "RewardTrainer", "KTOTrainer"]
)
def test_a_run_that_is_looked_into_is_the_stock_one_to_the_bit(name: str, tmp_path: Path) -> None:
    """What they collect while they compute a loss is put back, too."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl: `make compat` runs it in an environment that has it")
    from hf_divguard import DivergenceDetector
    from tests.hf.faults import ScriptedRule

    kind = KINDS[name]
    stock = make(kind, tmp_path / "stock", is_guarded=False, max_steps=STEPS, save_strategy="no")
    stock.train()
    asked = DivergenceDetector(ScriptedRule({16: 14}), action="stop")
    guarded = make(kind, tmp_path / "out", callbacks=[asked], max_steps=STEPS, save_strategy="no")
    guarded.train()
    assert guarded._run.comparison.looks.passes > 0
    assert [event["event"] for event in guarded.divguard_events] == ["dismissed"]
    assert same_weights(weights(stock.model), weights(guarded.model))
    logged = [
        {key: value for key, value in entry.items() if not _is_time(key)} for entry in stock.state.log_history
    ]
    assert logged == [
        {key: value for key, value in entry.items() if not _is_time(key)}
        for entry in guarded.state.log_history
        if not any(key.startswith("divguard/") for key in entry)
    ]


def _is_time(key: str) -> bool:
    return any(word in key for word in ("runtime", "per_second", "time"))
