"""With a trainer of policy gradients the level of the loss ends nothing; values that are not finite do, at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_divguard import DivGuardTrainingArguments, find_checkpoints, guard
from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector, NonFiniteDetector
from hf_divguard.hf.detectors_by_name import make_detector
from hf_divguard.hf.policy_watch import PolicyWatch
from tests.tiny import base_arguments


class Rising(Trainer):
    """A trainer with the loss of a policy gradient: about 0, then up with the distance to a reference."""

    not_finite_at = -1

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step
        loss = super().compute_loss(*args, **kwargs) * 0.0
        if step == self.not_finite_at:
            return loss * float("nan")
        return loss + 1e-3 * (step % 3) + (5.0 if step >= 40 else 0.0)


class TinyGRPOTrainer(Rising):
    """The same, with the name of a policy gradient."""


def run(make_trainer: Any, **options: Any) -> Any:
    options = {"trainer_class": guard(TinyGRPOTrainer), "divguard_detector": "adaptive", **options}
    return make_trainer(max_steps=80, save_steps=20, logging_steps=10, **options)


def test_a_loss_that_rises_with_the_distance_to_the_reference_ends_nothing(make_trainer: Any) -> None:
    trainer = run(make_trainer)
    trainer.train()
    assert trainer.state.global_step == 80
    assert trainer.state.divguard_finding is None


def test_the_same_loss_ends_a_trainer_of_another_name(make_trainer: Any) -> None:
    trainer = run(make_trainer, trainer_class=guard(Rising), divguard_compare="off")
    trainer.train()
    assert trainer.state.divguard_finding is not None


def test_a_loss_that_is_not_finite_is_found_in_its_own_step(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyGRPOTrainer, "not_finite_at", 13)
    trainer = run(make_trainer, divguard_action="abort", divguard_skip_nonfinite=False)
    trainer.train()
    assert trainer.state.global_step == 14
    assert trainer.state.divguard_finding.kind == "non_finite"


@pytest.mark.parametrize(("key", "kind"), [(None, NonFiniteDetector), ("reward", AdaptiveDivergenceDetector)])
def test_the_reward_can_be_watched_by_its_level(make_trainer: Any, key: Any, kind: Any) -> None:
    trainer = run(make_trainer, divguard_metric_key=key)
    detectors = [each for each in trainer.callback_handler.callbacks if isinstance(each, kind)]
    assert [each.metric_key for each in detectors] == [key or "loss"]


def test_settings_that_are_not_used_there_are_named(make_trainer: Any, our_log: Any) -> None:
    run(make_trainer, divguard_detector_kwargs={"sensitivity": 0.5, "scaler_patience": 3})
    assert "without the settings sensitivity" in our_log.text


def test_without_a_trainer_the_detector_is_the_one_that_was_named(tmp_path: Any) -> None:
    args = DivGuardTrainingArguments(**base_arguments(tmp_path, divguard_detector="adaptive"))
    assert isinstance(make_detector(args), AdaptiveDivergenceDetector)


class RewardedGRPOTrainer(TinyGRPOTrainer):
    """Logs a reward and a KL, as TRL does."""

    rewards: Any = staticmethod(lambda step: min(0.8, 0.01 * step))
    kl: Any = staticmethod(lambda step: 0.001 * step)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what TRL adds."""
        step = self.state.global_step
        if "loss" in logs:
            logs = {**logs, "reward": self.rewards(step), "kl": self.kl(step)}
        super().log(logs, *args, **kwargs)


def rewarded(make_trainer: Any, **options: Any) -> Any:
    options = {"trainer_class": guard(RewardedGRPOTrainer), "divguard_detector": "adaptive", **options}
    trainer = make_trainer(max_steps=120, save_steps=40, logging_steps=1, **options)
    trainer.train()
    return trainer


def warned(trainer: Any) -> list[tuple[str, int]]:
    events = [event for event in trainer.divguard_events if event["event"] == "warned"]
    return [(event["finding"]["metric"], event["step"]) for event in events]


def test_rising_reward_and_kl_are_no_matter(make_trainer: Any) -> None:
    assert warned(rewarded(make_trainer)) == []


@pytest.mark.parametrize("key", ["reward", "kl"])
def test_a_collapse_warns_once_and_ends_nothing(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, our_log: Any, key: str
) -> None:
    if key == "reward":
        monkeypatch.setattr(
            RewardedGRPOTrainer, "rewards", staticmethod(lambda step: 0.0 if step > 80 else 0.01 * step)
        )
    else:
        monkeypatch.setattr(
            RewardedGRPOTrainer, "kl", staticmethod(lambda step: 50.0 if step > 80 else 0.001 * step)
        )
    trainer = rewarded(make_trainer)
    assert trainer.state.global_step == 120
    assert trainer.state.divguard_finding is None
    found = warned(trainer)
    assert [metric for metric, _ in found] == [key]
    assert 81 <= found[0][1] <= 88
    assert f"`{key}`" in our_log.text
    # Nothing is marked: what was saved after it counts as before.
    assert {each.verdict.status for each in find_checkpoints(trainer.args.output_dir)} == {"complete"}
    assert trainer.state.divguard_stop_reason is None


def test_its_memory_is_kept_in_checkpoints(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = rewarded(make_trainer)
    watch = next(each for each in trainer.callback_handler.callbacks if isinstance(each, PolicyWatch))
    twin = PolicyWatch()
    twin.load_state_dict(watch.state_dict())
    assert twin.state_dict() == watch.state_dict()
    # A resumed run knows how high the reward was.
    monkeypatch.setattr(RewardedGRPOTrainer, "rewards", staticmethod(lambda step: 0.0))
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-80")
    assert [metric for metric, _ in warned(trainer)] == ["reward"]
