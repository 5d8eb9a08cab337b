"""The states that are kept for comparisons: how much memory they take, and how often copies are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_divguard import find_checkpoints
from hf_divguard.hf import kept as module
from hf_divguard.hf.kept import KeptStates
from hf_divguard.hf.ranks import Ranks
from tests.hf.test_comparison import Noise
from tests.tiny import TokenRows

MakeTrainer = Callable[..., Any]


def bytes_in(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(bytes_in, value.values()))
    return sum(map(bytes_in, value)) if isinstance(value, (list, tuple)) else 0


@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_four_states_take_the_memory_that_the_documentation_names(
    make_trainer: MakeTrainer, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`4 (w + o)` bytes, or `4 w` where no optimizer is needed."""
    taken: list[list[int]] = []
    take = KeptStates.take

    def noting(self: KeptStates, *args: Any) -> None:
        take(self, *args)
        taken.append([bytes_in((each.tensors, each.state.optimizer)) for each in self.all()])

    monkeypatch.setattr(KeptStates, "take", noting)
    trainer = make_trainer(
        train_dataset=TokenRows(rows=64),
        max_steps=40,
        save_strategy="no",
        divguard_detector="adaptive",
        divguard_action=action,
    )
    trainer.train()
    weights = sum(each.nbytes for each in trainer.model.parameters())
    buffers = sum(each.nbytes for each in trainer.model.buffers())
    optimizer = bytes_in(trainer.optimizer.state_dict()["state"]) if action == "rollback" else 0
    of_one = pytest.approx(weights + buffers + optimizer, rel=0.01)
    # The state before the first step has an optimizer without a state.
    assert len(taken[-1]) == 4
    assert taken[-1][1:] == [of_one] * 3
    assert taken[-1][0] in (of_one, weights + buffers)


@pytest.mark.parametrize(
    ("copy_seconds", "step_seconds", "steps"),
    [(0.001, 0.005, 5), (0.002, 0.01, 5), (0.01, 0.05, 20), (0.01, 0.5, 5), (3.0, 1.0, 300)],
)
def test_copies_take_at_most_a_hundredth_of_the_time(
    copy_seconds: float, step_seconds: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps take 50 ms or more; shorter ones have a copy every five steps as long as it takes less than 2.5 ms."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    class Copies(KeptStates):
        def copy_of_now(self, host: Any, step: int, callbacks: Any) -> Any:
            now[0] += copy_seconds
            state = type("State", (), {"optimizer": {}})()
            return type("Snapshot", (), {"step": step, "tensors": {}, "state": state})()

    copies = Copies(Ranks(0, 1), with_optimizer=True, limit_bytes=1e9)
    taken = []
    for step in range(2000):
        now[0] += step_seconds
        if copies.is_due(step):
            copies.take(None, step, {})  # type: ignore[arg-type]
            taken.append(step)
    assert taken[-1] - taken[-2] == pytest.approx(steps, rel=0.02)
    late = [step for step in taken if step >= 1000]
    if step_seconds >= 0.05:
        assert (len(late) - 1) * copy_seconds <= 0.0105 * (late[-1] - late[0]) * step_seconds


@pytest.mark.parametrize("save_steps", [10, 8])
def test_where_copies_are_rare_the_newest_good_checkpoint_is_compared_and_restored(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    """Its state is kept, too, so that the rollback goes no further back than to it."""
    monkeypatch.setattr(module, "_SHARE", 1e-9)
    trainer = make_trainer(
        callbacks=[Noise(28)],
        train_dataset=TokenRows(rows=64),
        max_steps=40,
        save_steps=save_steps,
        learning_rate=3e-3,
        divguard_detector="adaptive",
        divguard_action="rollback",
    )
    trainer.train()
    undone = [event for event in trainer.divguard_events if event["event"] == "rollback"]
    newest = 27 // save_steps * save_steps
    assert [event["target_step"] for event in undone] == [newest]
    assert undone[0]["finding"]["cause"] == "weights"
    assert newest in {checkpoint.step for checkpoint in find_checkpoints(trainer.args.output_dir)}
