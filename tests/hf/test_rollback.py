"""A run that diverges goes back in place and trains on; what it could not save it says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_divguard import (
    AdaptiveDivergenceDetector,
    DivergenceDetector,
    DualTimeScaleDivergenceDetector,
    DualWindowDivergenceDetector,
    NonFiniteDetector,
    TrainingDivergedError,
    find_checkpoints,
    latest_complete_checkpoint,
)
from tests.conftest import ScriptedMetric
from tests.hf.faults import (
    QUICK,
    AtRollback,
    HighRate,
    LargeGradients,
    NaNBatch,
    RatesUsed,
    ScriptedRule,
    Stream,
    holds,
    moves,
    nan_run,
    same_state,
    saved_weights,
)
from tests.tiny import TokenRows, checkpoint_steps, same_weights, tiny_model, weights

MakeTrainer = Callable[..., Any]


def scripted_run(
    make_trainer: MakeTrainer, onsets: dict[int, int], *, callbacks: Any = (), **options: Any
) -> Any:
    """Return a trainer that rolls back at the steps of ``onsets``."""
    detector = DivergenceDetector(ScriptedRule(onsets), action="rollback")
    return make_trainer(callbacks=[detector, *callbacks], **{**QUICK, **options})


# ---- what is put back


def test_weights_and_optimizer_are_those_of_the_target_in_the_same_objects(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The optimizer keeps its references, and no gradient is left in flight."""
    at = AtRollback()
    trainer = nan_run(make_trainer, range(10, 11), callbacks=[at])
    identities = [id(weight) for weight in trainer.model.parameters()]
    trainer.train()
    target = tmp_path / "out" / "checkpoint-8"
    assert moves(trainer) == [(10, 8)]
    assert holds(at.weights[0], target)
    saved = torch.load(target / "optimizer.pt", weights_only=True)
    assert same_state(at.optimizers[0]["state"], saved["state"])
    assert at.identities[0] == identities
    assert at.gradients[0] == 0


@pytest.mark.parametrize("memory", [False, True], ids=["disk", "memory"])
def test_with_data_and_rng_put_back_it_is_the_run_that_never_diverged(
    make_trainer: MakeTrainer, tmp_path: Path, memory: bool
) -> None:
    """Rolled back from 11 to 8: given the batches of 9 to 11 again, all later weights are equal bit by bit."""
    common = {"lr_scheduler_type": "constant", "dropout": 0.1}
    healthy = make_trainer(
        tmp_path / "healthy", train_dataset=Stream(list(range(24))), **{**QUICK, **common, "max_steps": 20}
    )
    healthy.train()
    order = [*range(11), 8, 9, 10, *range(11, 24)]
    where = {"divguard_snapshot_steps": 4, "save_strategy": "no"} if memory else {}
    trainer = nan_run(
        make_trainer,
        range(11, 12),
        train_dataset=Stream(order),
        divguard_restore_rng=True,
        **{**common, **where, "max_steps": 23},
    )
    trainer.train()
    assert moves(trainer) == [(11, 8)]
    assert same_weights(weights(trainer.model), weights(healthy.model))


def test_the_gradient_scaler_goes_back_too(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Its scale and growth counter are those of the target."""
    trainer = nan_run(make_trainer, range(10, 11))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    trainer.accelerator.scaler = scaler
    seen: list[float] = []

    class ScaleGrows(AtRollback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            scaler.load_state_dict({**scaler.state_dict(), "scale": float(2**state.global_step)})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "divguard/rollbacks" in logs:
                seen.append(scaler.get_scale())

    trainer.add_callback(ScaleGrows())
    trainer.train()
    assert seen == [2.0**8]


def test_a_healthy_run_ends_with_the_weights_of_an_unguarded_one(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Watching for divergence and keeping snapshots changes nothing."""
    stock = make_trainer(
        tmp_path / "stock",
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
        dropout=0.1,
        max_steps=24,
    )
    stock.train()
    guarded = make_trainer(
        divguard_detector="adaptive",
        divguard_action="rollback",
        divguard_snapshot_steps=5,
        dropout=0.1,
        **QUICK,
    )
    guarded.train()
    assert guarded.divguard_events == []
    assert same_weights(weights(stock.model), weights(guarded.model))


def test_gradient_accumulation_does_not_carry_bad_gradients_over(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """With two micro-batches a step the state after the rollback is the target's, and all stays finite."""
    at = AtRollback()
    trainer = nan_run(make_trainer, range(10, 11), callbacks=[at], gradient_accumulation_steps=2)
    trainer.train()
    assert moves(trainer) == [(10, 8)]
    assert holds(at.weights[0], tmp_path / "out" / "checkpoint-8")
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


# ---- what goes on


def test_the_data_go_on_and_no_batch_is_drawn_twice(make_trainer: MakeTrainer) -> None:
    """A streaming data set has no way back; what is skipped is told as a range of steps."""
    stream = Stream(list(range(40)))
    trainer = nan_run(make_trainer, range(10, 11), train_dataset=stream)
    trainer.train()
    assert stream.drawn == sorted(set(stream.drawn))
    assert trainer.divguard_events[0]["skipped_steps"] == [9, 10]
    assert trainer.state.global_step == 24


def test_steps_are_counted_on_in_logs_and_checkpoints(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Nothing goes backwards, and the state that was gone back to is saved under the present step."""
    trainer = nan_run(make_trainer, range(10, 11))
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history]
    assert steps == sorted(steps)
    assert checkpoint_steps(tmp_path / "out") == {4, 8, 10, 12, 16, 20, 24}
    assert same_state(
        saved_weights(tmp_path / "out" / "checkpoint-10"), saved_weights(tmp_path / "out" / "checkpoint-8")
    )


TIME_DRIVEN = [kind for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
SCHEDULE_OPTIONS = {
    "warmup_stable_decay": {"num_decay_steps": 8},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
}


@pytest.mark.parametrize("kind", TIME_DRIVEN, ids=lambda kind: kind.value)
def test_a_schedule_keeps_its_place_and_a_lowered_rate_stays_lowered_over_a_resume(
    make_trainer: MakeTrainer, tmp_path: Path, kind: SchedulerType
) -> None:
    """From the rollback on every update has half the rate that the schedule gives its step."""
    options = {
        "lr_scheduler_type": kind.value,
        "warmup_steps": 3,
        "lr_scheduler_kwargs": SCHEDULE_OPTIONS.get(kind.value, {}),
    }
    healthy = RatesUsed()
    make_trainer(tmp_path / "healthy", callbacks=[healthy], **{**QUICK, **options}).train()
    used = RatesUsed()
    rolled = {**options, "divguard_rollback_lr_factor": 0.5}
    trainer = nan_run(make_trainer, range(10, 11), callbacks=[used], **rolled)
    trainer.train()
    expected = {step: rate * (0.5 if step > 10 else 1.0) for step, rate in healthy.rates.items()}
    assert used.rates == pytest.approx(expected)
    resumed = RatesUsed()
    again = nan_run(make_trainer, range(0), callbacks=[resumed], **rolled)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-16"))
    assert resumed.rates == pytest.approx({step: expected[step] for step in range(17, 25)})


METRIC_DRIVEN = [kind.value for kind in SchedulerType if kind.value in ("reduce_lr_on_plateau", "greedy")]


@pytest.mark.parametrize("kind", METRIC_DRIVEN)
def test_a_schedule_by_evaluations_concludes_nothing_from_the_diverged_stretch(
    make_trainer: MakeTrainer, tmp_path: Path, kind: str
) -> None:
    """Its best value and counters are those of the target; the factor of the rollback stays, over a resume too."""
    options: dict[str, Any] = {
        "lr_scheduler_type": kind,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
        "divguard_rollback_lr_factor": 0.5,
        "divguard_check_steps": 20,
        "divguard_skip_nonfinite": False,
        "logging_steps": 100,
        "save_steps": 5,
        "max_steps": 26,
    }
    if kind == "greedy":
        options["lr_scheduler_kwargs"] = {"min_lr": 1e-3, "max_lr": 1e-2}
    used = RatesUsed()
    # The evaluations at 12 to 18 stand in the diverged stretch; the look at 20 is the first one after it began.
    trainer = scripted_run(make_trainer, {}, callbacks=[used], **options)
    rule = NonFiniteDetector(action="rollback")
    trainer.add_callback(rule)
    trainer.add_callback(NaNBatch(trainer.model, range(17, 18)))
    trainer.train()
    (move,) = moves(trainer)
    assert move == (18, 15), "looked at before the evaluation at 18"
    before, after = used.rates[15], used.rates[19]
    assert after == pytest.approx(0.5 * before)
    schedule = torch.load(tmp_path / "out" / "checkpoint-18" / "scheduler.pt", weights_only=True)
    assert math.isfinite(schedule["best"])
    resumed = RatesUsed()
    again = scripted_run(
        make_trainer, {}, callbacks=[resumed, NonFiniteDetector(action="rollback")], **options
    )
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-20"))
    assert resumed.rates == pytest.approx({step: used.rates[step] for step in range(21, 27)})


def test_the_rate_rises_again_over_the_steps_that_were_asked_for(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """A quarter, a half, three quarters, then the schedule's own; the schedule itself is not moved."""
    used = RatesUsed()
    trainer = nan_run(
        make_trainer, range(10, 11), callbacks=[used], lr_scheduler_type="constant", divguard_rewarm_steps=4
    )
    trainer.train()
    rate = trainer.args.learning_rate
    assert [used.rates[step] / rate for step in range(10, 17)] == pytest.approx([1, 0.25, 0.5, 0.75, 1, 1, 1])
    saved = torch.load(tmp_path / "out" / "checkpoint-12" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["lr"] == pytest.approx(rate)


# ---- logs and losses


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_a_nan_that_waits_to_be_logged_poisons_no_later_log(
    make_trainer: MakeTrainer, logging_steps: int
) -> None:
    """Without the stock filter one NaN would make every later loss NaN, and the mean of the run too."""
    trainer = nan_run(make_trainer, range(11, 12), logging_nan_inf_filter=False, logging_steps=logging_steps)
    result = trainer.train()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert moves(trainer) == [(11, 8)]
    assert all(math.isfinite(loss) for step, loss in losses.items() if step > 11)
    assert {15, 20} <= set(losses)
    assert math.isfinite(result.training_loss)


def test_the_next_log_holds_no_loss_of_the_diverged_stretch(make_trainer: MakeTrainer) -> None:
    """What waited to be logged is logged with the rollback, and counts in the mean of the run."""
    trainer = make_trainer(
        callbacks=[HighRate(range(31, 36))],
        divguard_detector="adaptive",
        divguard_action="rollback",
        divguard_compare="off",
        logging_steps=20,
        max_steps=80,
        save_steps=10,
        learning_rate=3e-3,
    )
    result = trainer.train()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    at = moves(trainer)[0][0]
    assert losses[at] > 2 * losses[20]
    assert all(loss < 1.1 * losses[20] for step, loss in losses.items() if step > at)
    assert result.training_loss > losses[80]


def test_the_story_is_told_in_file_attribute_logs_and_one_line(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    """The same numbers everywhere."""
    trainer = nan_run(make_trainer, range(10, 11))
    trainer.train()
    lines = (tmp_path / "out" / "divguard" / "events.jsonl").read_text().splitlines()
    (event,) = trainer.divguard_events
    assert [json.loads(line)["target_step"] for line in lines] == [8]
    assert {
        key: event[key]
        for key in ("event", "number", "incident", "attempt", "step", "onset_step", "target_step")
    } == {
        "event": "rollback",
        "number": 1,
        "incident": 1,
        "attempt": 1,
        "step": 10,
        "onset_step": 10,
        "target_step": 8,
    }
    assert event["target"] == "checkpoint-8"
    assert event["steps_lost"] == 2
    assert event["seconds"] > 0
    assert event["finding"]["kind"] == "non_finite"
    (logged,) = [entry for entry in trainer.state.log_history if "divguard/rollbacks" in entry]
    assert (logged["divguard/rollbacks"], logged["divguard/target_step"], logged["divguard/steps_lost"]) == (
        1,
        8,
        2,
    )
    told = [record.getMessage() for record in our_log.records if "Rollback" in record.getMessage()]
    assert len(told) == 1
    assert "Rollback 1 (incident 1, attempt 1 of 3) at step 10" in told[0]
    assert "the batches of steps 9 to 10 are skipped" in told[0]


def test_the_story_of_an_earlier_training_in_the_folder_is_kept(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Its lines stay, and are not taken for this training's."""
    first = nan_run(make_trainer, range(10, 11))
    first.train()
    second = nan_run(make_trainer, range(14, 15))
    second.train()
    lines = (tmp_path / "out" / "divguard" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 14]
    assert [event["step"] for event in second.divguard_events] == [14]


# ---- checkpoints


def test_nothing_of_the_diverged_stretch_is_saved_as_good_or_becomes_best(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """What was saved before the fault was seen is quarantined; the ranking holds good states alone."""
    trainer = make_trainer(
        callbacks=[HighRate(range(42, 47))],
        compute_metrics=None,
        divguard_detector="adaptive",
        divguard_action="rollback",
        divguard_compare="off",
        preserve_best_model=True,
        eval_on_save=True,
        max_steps=80,
        save_steps=4,
        learning_rate=3e-3,
    )
    trainer.train()
    (event,) = trainer.divguard_events
    onset, at = event["onset_step"], event["step"]
    verdicts = {info.step: info.verdict.status for info in find_checkpoints(tmp_path / "out")}
    between = {step for step in verdicts if onset - 1 <= step < at}
    assert between
    assert {step for step, status in verdicts.items() if status == "quarantined"} == between
    assert not between & {entry.step for entry in trainer.best_checkpoints(n=100)}
    assert trainer.state.best_global_step not in between


def test_a_resume_never_takes_a_quarantined_checkpoint_even_if_it_is_the_newest(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Without the state saved after the rollback it takes the one from before the fault."""
    trainer = scripted_run(make_trainer, {9: 7}, max_steps=9)
    trainer.train()
    out = tmp_path / "out"
    assert moves(trainer) == [(9, 4)]
    assert latest_complete_checkpoint(out).step == 9
    (out / "checkpoint-9").rename(tmp_path / "gone")
    assert latest_complete_checkpoint(out).step == 4
    resumed = scripted_run(make_trainer, {}, max_steps=12)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[0]["step"] <= 5


def test_rotation_takes_quarantined_checkpoints_first(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Of 4, 6 and 8 with 6 and 8 quarantined, those two go, although 4 is the oldest."""
    trainer = scripted_run(make_trainer, {9: 7}, save_steps=2, save_total_limit=3, max_steps=10)
    trainer.train()
    assert moves(trainer) == [(9, 4)]
    assert checkpoint_steps(tmp_path / "out") == {4, 9, 10}


def test_the_target_is_not_rotated_away_while_the_incident_is_open(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """A second attempt may need what the first one had."""
    trainer = scripted_run(make_trainer, {9: 7}, save_steps=4, save_total_limit=2, max_steps=24)
    trainer.train()
    assert 4 in checkpoint_steps(tmp_path / "out")


def test_the_state_that_a_second_attempt_would_take_is_not_rotated_away_either(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Where the same place fails again an older state is next: the save after the first rollback must not delete it."""
    trainer = scripted_run(
        make_trainer, {10: 10, 16: 11}, save_total_limit=2, save_steps=4, lr_scheduler_type="constant"
    )
    trainer.train()
    assert moves(trainer) == [(10, 8), (16, 4)]
    first, second = trainer.divguard_events
    assert (first["steps_lost"], second["steps_lost"]) == (2, 10), "no update is lost twice"
    assert second["learning_rate_after"] == first["learning_rate_before"]
    assert {4, 8} <= checkpoint_steps(tmp_path / "out")


def test_the_checkpoint_of_another_folder_that_a_run_comes_from_is_a_target_too(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """A run that is resumed into a new folder has no checkpoint there for a while."""
    scripted_run(make_trainer, {}, max_steps=8).train()
    trainer = scripted_run(make_trainer, {12: 11}, output_dir=tmp_path / "next", save_steps=100, max_steps=16)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert moves(trainer) == [(12, 8)]
    assert find_checkpoints(tmp_path / "out")[-1].verdict.status == "complete"


def test_a_target_that_cannot_be_read_is_passed_over(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    """Same size, other bytes: the next older state is taken, and the line says why."""

    class Damage(AtRollback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 9:
                path = tmp_path / "out" / "checkpoint-8" / "optimizer.pt"
                path.write_bytes(bytes(path.stat().st_size))

    at = Damage()
    trainer = nan_run(make_trainer, range(10, 11), callbacks=[at])
    trainer.train()
    assert moves(trainer) == [(10, 4)]
    assert holds(at.weights[0], tmp_path / "out" / "checkpoint-4")
    assert "Rolling back to step 8 failed" in our_log.text


def test_where_no_target_can_be_read_it_is_said_which_were_tried(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """They are there and old enough; that is not what is wrong with them."""

    class Damage(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for path in (tmp_path / "out").glob("checkpoint-*/optimizer.pt"):
                path.write_bytes(bytes(path.stat().st_size))

    trainer = nan_run(make_trainer, range(10, 11), callbacks=[Damage()])
    with pytest.raises(TrainingDivergedError, match="The states of step 4, 8 could not be restored"):
        trainer.train()


def test_while_a_fault_lasts_on_after_a_rollback_nothing_is_saved(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """A kill in the cool-down must not leave a bad checkpoint as the newest."""
    trainer = nan_run(make_trainer, range(10, 22), divguard_cooldown_steps=14)
    trainer.train()
    assert moves(trainer) == [(10, 8), (24, 4)]
    assert {info.step for info in find_checkpoints(tmp_path / "out")} == {4, 8, 10, 24}


def test_a_state_trained_through_the_rest_of_a_fault_is_put_back_once_more(make_trainer: MakeTrainer) -> None:
    """The fault passes within the cool-down: what the restored state took from it is undone, at the same rate."""
    trainer = scripted_run(
        make_trainer,
        {90: 81},
        train_dataset=Stream(list(range(140)), wrong=range(81, 101)),
        callbacks=[NonFiniteDetector(action="rollback")],
        divguard_cooldown_steps=40,
        max_steps=140,
        save_steps=10,
        lr_scheduler_type="constant",
    )
    trainer.train()
    first, second = trainer.divguard_events
    assert second["finding"]["kind"] == "rollback_repeated"
    assert (second["step"], second["target_step"]) == (131, first["target_step"])
    assert second["learning_rate_after"] == first["learning_rate_before"]


def test_a_fault_that_outlasts_the_cooldown_takes_another_rollback(make_trainer: MakeTrainer) -> None:
    """Findings are ignored in the cool-down, the loss is not; an older state is next."""
    trainer = scripted_run(
        make_trainer,
        {90: 81},
        train_dataset=Stream(list(range(140)), wrong=range(81, 112)),
        callbacks=[NonFiniteDetector(action="rollback")],
        divguard_cooldown_steps=20,
        max_steps=140,
        save_steps=10,
        lr_scheduler_type="constant",
    )
    trainer.train()
    first, second = trainer.divguard_events
    assert second["finding"]["kind"] == "not_recovered"
    assert (first["target_step"], second["step"], second["target_step"]) == (70, 111, 60)


# ---- damage that a run may live with


def exploding_run(make_trainer: MakeTrainer, **options: Any) -> Any:
    """Return a trainer whose gradients are a thousand times too large in five steps."""
    model = tiny_model()
    return make_trainer(
        model=model,
        callbacks=[LargeGradients(model, range(41, 46))],
        **{
            "divguard_detector": "adaptive",
            "divguard_action": "rollback",
            "max_grad_norm": 0.0,
            "max_steps": 80,
            "save_steps": 5,
            **options,
        },
    )


def test_gradients_that_explode_unclipped_are_undone_though_the_loss_does_not_show_them(
    make_trainer: MakeTrainer,
) -> None:
    """They would hold Adam back for the rest of the run."""
    trainer = exploding_run(make_trainer)
    trainer.train()
    warned, first, second = trainer.divguard_events
    assert (warned["event"], warned["finding"]["kind"]) == ("warned", "grad_explosion")
    assert (first["finding"]["kind"], first["onset_step"]) == ("grad_explosion", 41)
    # It was found at its third step; its last two struck the restored state, which is put back once more.
    assert (second["finding"]["kind"], second["onset_step"]) == ("rollback_repeated", 44)
    assert [first["target_step"], second["target_step"]] == [35, 35]
    second_moment = max(
        float(memory["exp_avg_sq"].max()) for memory in trainer.optimizer.state_dict()["state"].values()
    )
    assert second_moment < 1.0


def test_where_gradients_are_clipped_their_explosion_is_no_damage(make_trainer: MakeTrainer) -> None:
    """The update was as large as ever."""
    trainer = exploding_run(make_trainer, max_grad_norm=1.0)
    trainer.train()
    assert {event["event"] for event in trainer.divguard_events} <= {"warned"}


def test_damage_that_cannot_be_undone_is_lived_with(
    make_trainer: MakeTrainer, our_log: pytest.LogCaptureFixture
) -> None:
    """No checkpoint is old enough; a run that may go on well is not given up for it."""
    trainer = exploding_run(make_trainer, save_steps=60, divguard_compare="off")
    trainer.train()
    assert trainer.state.global_step == 80
    assert [event["event"] for event in trainer.divguard_events] == ["warned", "not_rolled_back"]
    assert "no checkpoint is old enough" in trainer.divguard_events[1]["reason"]
    assert our_log.text.count("It is not rolled back: no checkpoint is old enough") == 1


def test_training_that_ends_in_a_cooldown_does_not_end_with_a_ruined_model(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """At the last step the run is judged, put back, and saved."""
    at = AtRollback()
    trainer = nan_run(make_trainer, range(14, 1000), callbacks=[at], divguard_cooldown_steps=40)
    trainer.train()
    assert moves(trainer) == [(14, 12), (24, 8)]
    assert same_weights(weights(trainer.model), at.weights[-1])
    assert holds(weights(trainer.model), tmp_path / "out" / "checkpoint-24")
    assert holds(weights(trainer.model), tmp_path / "out" / "checkpoint-8")


# ---- giving up


def give_up(make_trainer: MakeTrainer, **options: Any) -> tuple[Any, TrainingDivergedError]:
    """Train under a fault that never passes; return the trainer and its error."""
    trainer = nan_run(make_trainer, range(10, 1000), max_steps=200, **options)
    with pytest.raises(TrainingDivergedError) as caught:
        trainer.train()
    return trainer, caught.value


def test_after_the_allowed_rollbacks_the_run_ends_with_the_best_weights_from_before_the_fault(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The error says what was found and what the model holds; here the evaluation at 4 was the best."""
    metric = ScriptedMetric([0.9, 0.5, *[0.1] * 50])
    trainer, error = give_up(
        make_trainer,
        compute_metrics=metric,
        preserve_best_model=True,
        best_model_metric="score",
        best_model_greater_is_better="true",
        eval_on_save=True,
    )
    assert len(moves(trainer)) == 3
    assert trainer.divguard_events[-1]["event"] == "gave_up"
    assert holds(weights(trainer.model), tmp_path / "out" / "checkpoint-4")
    assert error.finding is not None
    assert error.finding.metric in ("loss", "grad_norm")
    assert "failed again after 3 rollback(s)" in str(error)
    assert str(tmp_path / "out" / "checkpoint-4") in str(error)
    statuses = {info.step: info.verdict.status for info in find_checkpoints(tmp_path / "out")}
    assert {step for step, status in statuses.items() if status == "complete"} == {4, 8}


def test_a_run_that_ends_before_a_step_does_not_train_the_weights_that_it_ends_with(
    make_trainer: MakeTrainer,
) -> None:
    """The host takes the step that had begun, here with a rate that is far too high."""
    trainer = make_trainer(
        callbacks=[HighRate(range(28, 1000))],
        train_dataset=TokenRows(rows=64),
        max_steps=100,
        save_steps=5,
        learning_rate=3e-3,
        eval_on_save=True,
        preserve_best_model=True,
        divguard_detector="adaptive",
        divguard_action="rollback",
        divguard_check_steps=1,
        divguard_max_rollbacks=1,
        divguard_cooldown_steps=2,
    )
    with pytest.raises(TrainingDivergedError):
        trainer.train()
    event = trainer.divguard_events[-1]
    assert (event["event"], event["step"] + 1) == ("gave_up", trainer.state.global_step)
    assert holds(weights(trainer.model), event["checkpoint"])
    assert not trainer.optimizer.state


def test_without_evaluations_the_newest_state_from_before_the_fault_is_what_remains(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The number of attempts is an option."""
    trainer, _ = give_up(make_trainer, divguard_max_rollbacks=1)
    assert len(moves(trainer)) == 1
    assert holds(weights(trainer.model), tmp_path / "out" / "checkpoint-8")


def test_without_a_state_old_enough_the_run_stops_at_once_and_says_what_would_help(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Never silence: no checkpoint was saved before the fault."""
    trainer = nan_run(make_trainer, range(3, 4))
    with pytest.raises(
        TrainingDivergedError, match=r"no checkpoint is old enough.*`divguard_snapshot_steps`"
    ):
        trainer.train()
    assert trainer.state.global_step == 3
    assert checkpoint_steps(tmp_path / "out") == set()


def test_with_snapshots_the_start_of_the_run_is_always_there_to_go_back_to(make_trainer: MakeTrainer) -> None:
    """A fault in the first steps costs those steps alone."""
    trainer = nan_run(make_trainer, range(3, 4), divguard_snapshot_steps=10, save_strategy="no")
    trainer.train()
    assert moves(trainer) == [(3, 0)]
    assert trainer.state.global_step == 24


def test_given_up_without_checkpoints_the_model_holds_the_newest_snapshot_from_before(
    make_trainer: MakeTrainer,
) -> None:
    """Memory is all there is."""
    at = AtRollback()
    trainer, error = give_up(make_trainer, divguard_snapshot_steps=4, save_strategy="no", callbacks=[at])
    assert "the weights of step 8, from memory" in str(error)
    assert moves(trainer)[0][1] == 8
    assert same_weights(weights(trainer.model), at.weights[0])


# ---- where to keep states


def test_a_snapshot_in_memory_needs_no_checkpoint_on_disk(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Weights and optimizer come from memory; the folder holds no checkpoint."""
    trainer = nan_run(make_trainer, range(11, 12), divguard_snapshot_steps=4, save_strategy="no")
    trainer.train()
    (event,) = trainer.divguard_events
    assert (event["target_step"], event["target"]) == (8, "memory")
    assert checkpoint_steps(tmp_path / "out") == set()
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


@pytest.mark.parametrize("memory", [False, True], ids=["disk", "memory"])
def test_lora_adapters_go_back_and_the_frozen_weights_stay(
    make_trainer: MakeTrainer, tmp_path: Path, memory: bool
) -> None:
    """Only the adapter was trained, only the adapter is put back."""
    peft = pytest.importorskip("peft")
    base = tiny_model()
    frozen = weights(base)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config)
    at = AtRollback()
    where = {"divguard_snapshot_steps": 4, "save_strategy": "no"} if memory else {}
    trainer = nan_run(make_trainer, range(10, 11), model=model, callbacks=[at], **where)
    identities = [id(weight) for weight in model.parameters()]
    trainer.train()
    assert moves(trainer) == [(10, 8)]
    assert at.identities[0] == identities
    for name, weight in model.named_parameters():
        if "lora" not in name:
            kept = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, frozen[kept])
        assert torch.isfinite(weight).all()
    if not memory:
        from safetensors.torch import load_file

        saved = load_file(tmp_path / "out" / "checkpoint-8" / "adapter_model.safetensors")
        for name, tensor in saved.items():
            live = name.replace(".lora_A.weight", ".lora_A.default.weight")
            live = live.replace(".lora_B.weight", ".lora_B.default.weight")
            assert torch.equal(at.weights[0][live], tensor)


# ---- detectors of every kind


@pytest.mark.parametrize(
    ("detector", "options"),
    [
        (DualTimeScaleDivergenceDetector(0.5, 0.05, 0.5, action="rollback", use_eval_loss=False), {}),
        (DualWindowDivergenceDetector(2, 8, 0.5, action="rollback", use_eval_loss=False), {}),
        (
            DualTimeScaleDivergenceDetector(0.5, 0.05, 0.5, action="rollback"),
            {"eval_strategy": "steps", "eval_steps": 2},
        ),
        (
            DualWindowDivergenceDetector(1, 4, 0.5, action="rollback"),
            {"eval_strategy": "steps", "eval_steps": 2},
        ),
        (AdaptiveDivergenceDetector(action="rollback"), {}),
    ],
    ids=["ema of logs", "window of logs", "ema of evaluations", "window of evaluations", "adaptive"],
)
def test_every_detector_can_roll_back(
    make_trainer: MakeTrainer, tmp_path: Path, detector: Any, options: dict[str, Any]
) -> None:
    """The run ends about where it would have without the fault."""
    common = {
        "max_steps": 100,
        "save_steps": 10,
        "learning_rate": 3e-3,
        "divguard_cooldown_steps": 10,
        **options,
    }
    trainer = make_trainer(callbacks=[HighRate(range(51, 56)), detector], **common)
    trainer.train()
    assert moves(trainer)
    assert moves(trainer)[0][1] <= 50
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert losses[100] < losses[50] + 0.3


def test_an_evaluation_that_is_due_is_done_on_the_state_that_was_gone_back_to(
    make_trainer: MakeTrainer,
) -> None:
    """A log that shows the divergence keeps the diverged weights from being evaluated, ranked and saved."""
    trainer = scripted_run(
        make_trainer,
        {8: 6},
        eval_strategy="steps",
        eval_steps=4,
        preserve_best_model=True,
        callbacks=[HighRate(range(6, 9))],
    )
    trainer.train()
    evals = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert moves(trainer) == [(8, 4)]
    assert evals[8] == evals[4]
    assert list(evals) == [4, 8, 12, 16, 20, 24]


# ---- where it cannot work


def test_a_stock_trainer_cannot_roll_back_and_says_what_can(make_trainer: MakeTrainer) -> None:
    """A clear sentence before the first step."""
    trainer = make_trainer(
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
        callbacks=[AdaptiveDivergenceDetector(action="rollback")],
    )
    with pytest.raises(ValueError, match="`action='rollback'` needs `DivGuardTrainer`"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("is_deepspeed_enabled", "does not work with DeepSpeed, whose engine owns the optimizer"),
    ],
)
def test_engines_that_own_the_optimizer_are_refused_before_the_first_step(
    make_trainer: MakeTrainer, attribute: str, said: str
) -> None:
    """The sentence says what is supported and what to do instead."""
    trainer = nan_run(make_trainer, range(0))
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=said) as caught:
        trainer.train()
    assert "Set the action to 'stop', and start the script again with resume_from_checkpoint='auto'" in str(
        caught.value
    )
    assert "DistributedDataParallel" in str(caught.value)


def test_another_kind_of_distribution_is_refused_by_its_name(make_trainer: MakeTrainer) -> None:
    """What is not known to work is not tried."""
    trainer = nan_run(make_trainer, range(0))
    trainer.accelerator.state.distributed_type, kept = (
        SimpleNamespace(value="MEGATRON_LM"),
        trainer.accelerator.state.distributed_type,
    )
    try:
        with pytest.raises(ValueError, match="does not work with Megatron-LM"):
            trainer.train()
    finally:
        trainer.accelerator.state.distributed_type = kept


def test_checkpoints_without_optimizer_are_refused_before_the_first_step(make_trainer: MakeTrainer) -> None:
    """Unless states are kept in memory."""
    with pytest.raises(ValueError, match="needs the optimizer of a checkpoint, but `save_only_model=True`"):
        nan_run(make_trainer, range(0), save_only_model=True).train()
    trainer = nan_run(make_trainer, range(10, 11), save_only_model=True, divguard_snapshot_steps=4)
    trainer.train()
    assert moves(trainer) == [(10, 8)]
    assert trainer.divguard_events[0]["target"] == "memory"


# ---- other loops


def test_a_run_that_finds_its_batch_size_rolls_back_in_the_loop_it_ends_up_in(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The memory of the first try is gone with it."""
    model = tiny_model()

    def refuse_large_batches(module: Any, inputs: Any, output: Any) -> None:
        if output.shape[0] > 4 and module.training:
            raise RuntimeError("CUDA out of memory.")

    model.transformer.wte.register_forward_hook(refuse_large_batches)
    trainer = nan_run(
        make_trainer,
        range(10, 11),
        model=model,
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
    )
    trainer.train()
    assert moves(trainer) == [(10, 8)]
    assert trainer.state.global_step == 24


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_goes_back_like_any_other(
    make_trainer: MakeTrainer, tmp_path: Path, backend: str
) -> None:
    """The compiled code works on the same parameters."""
    at = AtRollback()
    trainer = nan_run(
        make_trainer,
        range(0),
        callbacks=[HighRate(range(41, 46)), at, AdaptiveDivergenceDetector(action="rollback")],
        torch_compile=True,
        torch_compile_backend=backend,
        max_steps=70,
        save_steps=10,
        learning_rate=3e-3,
    )
    try:
        trainer.train()
    except Exception as error:
        if "Compiler" in repr(error) or "compiler" in str(error):
            pytest.skip(f"no compiler works here: {error}")
        raise
    assert moves(trainer)
    target = tmp_path / "out" / f"checkpoint-{moves(trainer)[0][1]}"
    plain = {name.removeprefix("_orig_mod."): weight for name, weight in at.weights[0].items()}
    assert holds(plain, target)


def test_a_resumed_run_knows_its_rollbacks_and_their_counter(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Events, numbers, and the state of the incident."""
    first = nan_run(make_trainer, range(10, 11), max_steps=12, lr_scheduler_type="constant")
    first.train()
    again = nan_run(make_trainer, range(15, 16), lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    told = [
        (event["number"], event["incident"], event["attempt"], event["step"])
        for event in again.divguard_events
    ]
    assert told == [(1, 1, 1, 10), (2, 1, 2, 15)]


def test_a_rollback_that_a_resume_has_undone_stays_in_the_file_and_says_so(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """From memory nothing is saved at once; done again, it takes the place of the first."""
    options: dict[str, Any] = {"divguard_snapshot_steps": 4, "lr_scheduler_type": "constant"}
    first = nan_run(make_trainer, range(11, 12), max_steps=11, **options)
    first.train()
    assert moves(first) == [(11, 8)]
    before = str(tmp_path / "out" / "checkpoint-8")
    path = tmp_path / "out" / "divguard" / "events.jsonl"
    without = nan_run(make_trainer, range(0), max_steps=10, **options)
    without.train(resume_from_checkpoint=before)
    assert without.divguard_events == []
    assert [json.loads(line)["undone_by_resume_from"] for line in path.read_text().splitlines()] == [8]
    again = nan_run(make_trainer, range(11, 12), max_steps=14, **options)
    again.train(resume_from_checkpoint=before)
    assert moves(again) == [(11, 8)]
    (line,) = path.read_text().splitlines()
    assert "undone_by_resume_from" not in json.loads(line)
