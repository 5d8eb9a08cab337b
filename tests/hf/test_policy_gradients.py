"""With a trainer of policy gradients the level of the loss ends nothing; values that are not finite do, at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_divguard import DivGuardTrainingArguments, guard
from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector, NonFiniteDetector
from hf_divguard.hf.detectors_by_name import make_detector
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
