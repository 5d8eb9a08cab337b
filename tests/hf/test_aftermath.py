"""What a finding leaves behind: saves, the end of training, patience, the best metric, what a later run is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer

from hf_divguard import (
    AdaptiveDivergenceDetector,
    DivergenceDetector,
    DivGuardMixin,
    DualTimeScaleDivergenceDetector,
    DualWindowDivergenceDetector,
    NonFiniteDetector,
    TrainingDivergedError,
    best_checkpoints,
    find_checkpoints,
)
from tests.conftest import AskAt, MetricByStep, ScriptedMetric
from tests.hf.faults import (
    QUICK,
    AtRollback,
    HighRate,
    NaNBatch,
    ScriptedRule,
    holds,
    moves,
    nan_run,
    saved_weights,
)
from tests.tiny import TokenRows, tiny_model, weights

MakeTrainer = Callable[..., Any]

SCORED = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}
BY_BEST = {**SCORED, "save_strategy": "best"}
BY_LOGS = {"short_alpha": 0.5, "long_alpha": 0.05, "threshold": 0.5, "use_eval_loss": False}


def is_finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether all weights are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


# ---- the loss is looked at, whatever the detector works on


def test_a_detector_on_logs_does_not_end_with_a_ruined_model(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The fault lasts through the cool-down to the end of training."""
    detector = DualTimeScaleDivergenceDetector(**BY_LOGS, action="rollback")
    options = {"logging_nan_inf_filter": False, "divguard_cooldown_steps": 20}
    trainer = nan_run(make_trainer, range(14, 100), detector=detector, **options)
    trainer.train()
    assert moves(trainer) == [(14, 12), (24, 8)]
    assert is_finite(weights(trainer.model))
    for info in find_checkpoints(tmp_path / "out"):
        assert info.verdict.status != "complete" or is_finite(saved_weights(info.path))


def test_a_detector_on_logs_keeps_nan_out_of_the_mean_loss(make_trainer: MakeTrainer) -> None:
    """That of the whole training, which the host gives at its end."""
    detector = DualTimeScaleDivergenceDetector(**BY_LOGS, action="rollback")
    trainer = nan_run(make_trainer, range(20, 21), detector=detector, logging_nan_inf_filter=False)
    logged = [1.9, 2.3]  # what the losses of this run lie between
    assert logged[0] * 23 / 24 < trainer.train().training_loss < logged[1]
    assert moves(trainer) == [(20, 16)]


def test_the_log_of_a_rollback_holds_no_number_that_hides_a_nan(make_trainer: MakeTrainer) -> None:
    """The host's filter puts 0.0 in the place of a NaN that is the first of its log."""
    trainer = nan_run(make_trainer, range(16, 17), logging_steps=5)
    trainer.train()
    assert moves(trainer) == [(16, 12)]
    (told,) = [entry for entry in trainer.state.log_history if "divguard/rollbacks" in entry]
    assert "loss" not in told
    assert all(entry["loss"] > 1.0 for entry in trainer.state.log_history if "loss" in entry)


# ---- what is saved


@pytest.mark.parametrize("when", ["on_log", "on_evaluate", "on_step_end"])
def test_no_save_under_a_lasting_fault_whoever_asks_for_it(
    make_trainer: MakeTrainer, tmp_path: Path, when: str
) -> None:
    """A user's callback may ask at any event."""
    asks = AskAt(save=[16], when=when)
    trainer = nan_run(
        make_trainer,
        range(10, 40),
        callbacks=[asks],
        divguard_cooldown_steps=14,
        max_steps=20,
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.train()
    assert 16 not in {info.step for info in find_checkpoints(tmp_path / "out")}


def test_no_save_under_a_lasting_fault_for_a_metric_that_seems_the_best(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """With ``save_strategy="best"`` it is the evaluation that asks."""
    metric = MetricByStep(lambda step: step / 100)
    trainer = nan_run(
        make_trainer,
        range(14, 20),
        callbacks=[metric],
        compute_metrics=metric,
        **BY_BEST,
        divguard_cooldown_steps=14,
        max_steps=40,
    )
    trainer.train()
    for info in find_checkpoints(tmp_path / "out"):
        assert is_finite(saved_weights(info.path)), info.step


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_checkpoint_that_was_just_saved_gets_the_state_that_was_gone_back_to(
    make_trainer: MakeTrainer, tmp_path: Path, mode: str
) -> None:
    """The epoch ends at a step that is saved; its evaluation comes after the save."""
    at = AtRollback()
    detector = DivergenceDetector(ScriptedRule({8: 6}), action="rollback", metric_key="eval_loss")
    trainer = make_trainer(
        callbacks=[detector, at], **{**QUICK, "max_steps": 10}, eval_strategy="epoch", divguard_save_mode=mode
    )
    trainer.train()
    assert moves(trainer) == [(8, 4)]
    assert holds(at.weights[0], tmp_path / "out" / "checkpoint-8")
    assert {info.step: info.verdict.status for info in find_checkpoints(tmp_path / "out")}[8] == "complete"


def test_the_state_that_was_gone_back_to_is_saved_with_any_strategy_that_saves(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Also where only the best is saved."""
    metric = MetricByStep(lambda step: {4: 0.3, 8: 0.4, 12: 0.4}.get(step, 0.1))
    trainer = nan_run(
        make_trainer,
        range(12, 13),
        callbacks=[metric],
        compute_metrics=metric,
        **BY_BEST,
    )
    trainer.train()
    assert moves(trainer) == [(12, 8)]
    assert {info.step for info in find_checkpoints(tmp_path / "out")} >= {8, 12}


def test_what_another_detector_has_put_back_is_not_called_spoilt(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """One stops on NaN, another rolls back: the run ends, with good weights in a good checkpoint."""
    detectors = [AdaptiveDivergenceDetector(action="rollback"), NonFiniteDetector(action="stop")]
    trainer = nan_run(make_trainer, range(14, 15), detector=detectors[0], callbacks=detectors[1:])
    trainer.train()
    assert moves(trainer) == [(14, 12)]
    assert {info.step: info.verdict.status for info in find_checkpoints(tmp_path / "out")}[14] == "complete"


def test_without_saves_and_snapshots_it_is_said_that_there_is_nothing_to_go_back_to(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    """At the start, not after the fault."""
    nan_run(make_trainer, range(0), save_strategy="no", max_steps=2).train()
    assert "there is nothing to roll back to" in our_log.text


# ---- the end of training


@pytest.mark.parametrize("when", ["on_step_end", "on_log"])
def test_a_run_that_is_ended_in_a_cooldown_does_not_end_with_a_ruined_model(
    make_trainer: MakeTrainer, when: str
) -> None:
    """By a user's callback, long before ``max_steps``."""
    trainer = nan_run(
        make_trainer,
        range(10, 1000),
        callbacks=[AskAt(stop=[18], when=when)],
        divguard_cooldown_steps=20,
        max_steps=100,
    )
    trainer.train()
    assert trainer.state.global_step == 18
    assert moves(trainer) == [(10, 8), (18, 4)]
    assert is_finite(weights(trainer.model))


def test_an_end_that_an_undone_evaluation_has_asked_for_is_undone_too(make_trainer: MakeTrainer) -> None:
    """``EarlyStoppingCallback`` and the detector see the same bad evaluation."""
    trainer = make_trainer(
        callbacks=[
            EarlyStoppingCallback(early_stopping_patience=1),
            HighRate(range(22, 24)),
            DualTimeScaleDivergenceDetector(0.5, 0.05, 0.5, action="rollback"),
        ],
        **{**QUICK, "max_steps": 60},
        eval_strategy="steps",
        eval_steps=4,
        metric_for_best_model="loss",
        learning_rate=3e-3,
    )
    trainer.train()
    assert len(moves(trainer)) == 1
    assert trainer.state.global_step > 28


def test_evaluations_of_the_undone_stretch_do_not_use_up_the_patience(make_trainer: MakeTrainer) -> None:
    """Three bad ones are undone; a patience of four is not met by the one that follows."""
    metric = MetricByStep(lambda step: {4: 0.5, 8: 0.4, 12: 0.3, 16: 0.2, 20: 0.4, 24: 0.6}.get(step, 0.6))
    trainer = make_trainer(
        callbacks=[
            DivergenceDetector(ScriptedRule({18: 7}), action="rollback"),
            EarlyStoppingCallback(early_stopping_patience=4),
            metric,
        ],
        **{**QUICK, "max_steps": 28},
        **SCORED,
        compute_metrics=metric,
    )
    trainer.train()
    assert moves(trainer) == [(18, 4)]
    assert trainer.state.global_step == 28


def test_a_best_metric_of_the_undone_stretch_is_forgotten_without_saves_too(
    make_trainer: MakeTrainer,
) -> None:
    """Snapshots only: the host has no checkpoint to name."""
    metric = MetricByStep(lambda step: {4: 0.1, 8: 0.2, 12: 0.95, 16: 0.3}.get(step, 0.4))
    trainer = make_trainer(
        callbacks=[DivergenceDetector(ScriptedRule({14: 11}), action="rollback"), metric],
        **{**QUICK, "max_steps": 20},
        save_strategy="no",
        divguard_snapshot_steps=4,
        **SCORED,
        compute_metrics=metric,
    )
    trainer.train()
    assert trainer.state.best_metric == 0.4


# ---- what is known later


def test_the_metric_of_undone_weights_is_never_that_of_the_restored_ones(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The evaluation at 8 raises the rollback; checkpoint-8 then holds other weights than it was measured on."""

    def trainer(values: list[float], max_steps: int) -> Any:
        return make_trainer(
            callbacks=[
                DivergenceDetector(ScriptedRule({8: 6}), action="rollback", metric_key="eval_loss"),
            ],
            **{**QUICK, "max_steps": max_steps},
            eval_strategy="steps",
            eval_steps=4,
            compute_metrics=ScriptedMetric(values),
            preserve_best_model=True,
            best_model_metric="score",
            best_model_greater_is_better=True,
        )

    trainer([0.5, 0.99, 0.6], 8).train()
    assert 0.99 not in [info.metric for info in best_checkpoints(tmp_path / "out")]
    resumed = trainer([0.6, 0.61], 16)
    resumed.train(resume_from_checkpoint=True)
    assert 0.99 not in [checkpoint.metric for checkpoint in resumed.best_checkpoints(9)]


def test_the_trainer_can_train_again_after_it_has_given_up(make_trainer: MakeTrainer) -> None:
    """The optimizer that went through the fault is not used again."""
    trainer = nan_run(make_trainer, range(10, 20), divguard_max_rollbacks=1)
    with pytest.raises(TrainingDivergedError):
        trainer.train()
    (fault,) = [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, NaNBatch)]
    fault.steps = range(0)
    trainer.train()
    assert trainer.state.global_step == 24
    assert moves(trainer) == []
    assert is_finite(weights(trainer.model))


def test_a_detector_whose_state_does_not_fit_starts_anew_and_the_rollback_takes_place(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    """The name was another detector's when the checkpoint was saved."""
    window = DualWindowDivergenceDetector(2, 8, 0.5, action="rollback", use_eval_loss=False, name="guard")
    make_trainer(callbacks=[window], **{**QUICK, "max_steps": 12}).train()
    ema = DualTimeScaleDivergenceDetector(**BY_LOGS, action="rollback", name="guard")
    trainer = make_trainer(
        callbacks=[ema, HighRate(range(14, 17))], **{**QUICK, "max_steps": 40, "save_steps": 100}
    )
    trainer.train(resume_from_checkpoint=True)
    assert moves(trainer)[0][1] == 12
    assert "does not fit, so it starts from scratch" in our_log.text


def test_without_preserving_the_best_is_by_the_metric_that_the_host_tracks(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """In its direction: a greater accuracy is better, a greater loss is not."""
    metric = MetricByStep(lambda step: {4: 0.5, 8: 0.9, 12: 0.7}.get(step, 0.1), name="accuracy")
    model = tiny_model()
    trainer = make_trainer(
        model=model,
        callbacks=[NaNBatch(model, range(15, 100)), NonFiniteDetector(action="rollback"), metric],
        **QUICK,
        eval_strategy="steps",
        eval_steps=4,
        compute_metrics=metric,
        metric_for_best_model="accuracy",
        divguard_max_rollbacks=1,
        divguard_skip_nonfinite=False,
        train_dataset=TokenRows(),
    )
    with pytest.raises(TrainingDivergedError, match="checkpoint-8"):
        trainer.train()
    assert next(info.step for info in best_checkpoints(tmp_path / "out")) == 8


# ---- what a stopped run is told


def test_a_stopped_run_says_from_which_checkpoint_to_go_on_and_a_resume_from_a_later_one_warns(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    """The checkpoint that ``stop`` saves last holds the diverged weights."""

    def trainer() -> Any:
        detector = DivergenceDetector(ScriptedRule({14: 11}), action="stop")
        return make_trainer(callbacks=[detector], **QUICK)

    trainer().train()
    good, last = (str(tmp_path / "out" / f"checkpoint-{step}") for step in (8, 14))
    assert f"The last good checkpoint is {good}." in our_log.text
    assert f"--resume_from_checkpoint {good}" in our_log.text
    our_log.clear()
    trainer().train(resume_from_checkpoint=last)
    assert f"{last} was saved after a divergence" in our_log.text
    assert f"The last good checkpoint is {good}." in our_log.text
    our_log.clear()
    trainer().train(resume_from_checkpoint=good)
    assert "was saved after a divergence" not in our_log.text


def test_an_action_without_a_detector_is_told(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    """As soon as the arguments are made, whatever callbacks there are: those have an action of their own."""
    make_trainer(divguard_action="rollback", max_steps=1)
    assert "`divguard_action='rollback'` has no detector to act for" in our_log.text


def test_the_mixin_on_the_wrong_side_is_refused_where_the_class_is_made() -> None:
    """There it would guard nothing."""
    with pytest.raises(TypeError, match="must stand left of the Trainer class"):
        type("Swapped", (Trainer, DivGuardMixin), {})


def test_a_setting_that_is_a_text_is_refused_by_its_name(make_trainer: MakeTrainer) -> None:
    """As from a command line with quotes too many."""
    with pytest.raises(TypeError, match=r"`threshold` must be a number, got .x. \(detector .ema.\)"):
        make_trainer(divguard_detector="ema", divguard_detector_kwargs='{"threshold": "x"}')


@pytest.mark.parametrize("action", ["stop", "abort"])
def test_an_end_that_another_detector_has_asked_for_stands(make_trainer: MakeTrainer, action: str) -> None:
    """Both see the same evaluation: one rolls back, the other ends the run, and end it does."""
    rolls_back, ends = (
        DivergenceDetector(ScriptedRule({12: 10}), action=each, metric_key="eval_loss", name=each)
        for each in ("rollback", action)
    )
    trainer = make_trainer(callbacks=[rolls_back, ends], **QUICK, eval_strategy="steps", eval_steps=4)
    trainer.train()
    assert trainer.state.global_step == 12


def test_an_evaluation_that_was_nan_is_not_the_best_after_a_rollback(make_trainer: MakeTrainer) -> None:
    """The host never takes NaN for the best; it is all that is left up to the target."""
    metric = MetricByStep(lambda step: float("nan") if step == 4 else step / 100)
    trainer = make_trainer(
        callbacks=[DivergenceDetector(ScriptedRule({10: 7}), action="rollback"), metric],
        **QUICK,
        save_strategy="no",
        divguard_snapshot_steps=4,
        **SCORED,
        compute_metrics=metric,
    )
    trainer.train()
    assert moves(trainer) == [(10, 4)]
    assert trainer.state.best_metric == 0.24
