"""After every save the folders on disk are the last ``save_total_limit`` and the best ``preserve_n_best``."""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
from tests.conftest import AskAt, MetricByStep, Recorder
from tests.tiny import TokenRows, base_arguments, checkpoint_steps, tiny_model

# The stock Trainer doubts the times of folders that are made within a second.
pytestmark = pytest.mark.filterwarnings("ignore:mtime may not be reliable")

NAN, INF = math.nan, math.inf
BEST = {"preserve_best_model": True, "best_model_metric": "score", "best_model_greater_is_better": True}


class ShuffleTimes(TrainerCallback):
    """Gives every checkpoint folder a random time of change after each save."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            moment = self.random.randrange(1_000_000_000, 1_700_000_000)
            os.utime(folder, (moment, moment))


# ---- the oracle


def expected_disks(
    saves: list[tuple[int, float | None]], limit: int | None, n: int, greater: bool
) -> list[set[int]]:
    """Return what has to stand after each save, found by comparing every save with every other."""

    def is_beaten_by(first: tuple[int, float], second: tuple[int, float]) -> bool:
        (step, metric), (other_step, other) = first, second
        if not math.isfinite(metric) or not math.isfinite(other):
            if math.isfinite(metric) != math.isfinite(other):
                return math.isfinite(other)
            return other_step > step
        if metric == other:
            return other_step > step
        return other > metric if greater else other < metric

    disks = []
    for number in range(1, len(saves) + 1):
        done = saves[:number]
        if limit is None:
            disks.append({step for step, _ in done})
            continue
        ranked = [(step, metric) for step, metric in done if metric is not None]
        best = {entry[0] for entry in ranked if sum(is_beaten_by(entry, other) for other in ranked) < n}
        disks.append({step for step, _ in done[-limit:]} | best)
    return disks


METRICS = st.one_of(
    st.none(),  # this step is saved without an evaluation
    st.sampled_from([NAN, INF, -INF]),
    st.sampled_from([0.0, 0.5, 1.0]),  # ties
    st.floats(-1e6, 1e6),
)


def check_against_oracle(
    script: list[float | None],
    greater: bool,
    limit: int | None,
    n: int,
    cut: int | None,
    moves: bool,
) -> None:
    values = dict(enumerate(script, start=1))
    steps = len(script)
    with tempfile.TemporaryDirectory() as folder:
        output_dir, disks = os.path.join(folder, "run"), []
        for part in ("before the cut", "after it"):
            is_whole = cut is None or cut >= steps
            if part == "after it" and is_whole:
                break
            metric = MetricByStep(values)
            recorder = Recorder()
            callbacks = [
                metric,
                AskAt(evaluate={step for step, value in values.items() if value is not None}),
                AskAt(stop={cut} if part == "before the cut" else ()),
                recorder,
                ShuffleTimes(),
            ]
            options = base_arguments(
                output_dir,
                max_steps=steps,
                save_steps=1,
                eval_strategy="steps",
                eval_steps=1000,
                save_total_limit=limit,
                logging_strategy="no",
                preserve_best_model=True,
                best_model_metric="score",
                best_model_greater_is_better=greater,
                preserve_n_best=n,
            )
            # Later versions of the host evaluate at the last step without being asked.
            values.setdefault(steps, None)
            if values[steps] is None:
                metric.values = {**values, steps: NAN}
            trainer = DivGuardTrainer(
                model=tiny_model(),
                args=DivGuardTrainingArguments(**options),
                train_dataset=TokenRows(40),
                eval_dataset=TokenRows(2),
                callbacks=callbacks,
                compute_metrics=metric,
            )
            trainer.train(resume_from_checkpoint=part == "after it")
            disks += recorder.disk
            assert checkpoint_steps(output_dir) == recorder.disk[-1]
            if part == "before the cut" and moves and not is_whole:
                moved = os.path.join(folder, "moved")
                shutil.move(output_dir, moved)
                output_dir = moved
        evaluated = {
            entry["step"]: entry["eval_score"] for entry in trainer.state.log_history if "eval_score" in entry
        }
        saves = [(step, evaluated.get(step)) for step in range(1, steps + 1)]
        assert [step for step, value in saves[:-1] if value is not None] == [
            step for step, value in list(values.items())[: steps - 1] if value is not None
        ]
        assert disks == expected_disks(saves, limit, n, greater)
        check_best_agrees(trainer, saves, n, greater)


def check_best_agrees(trainer: Any, saves: list[tuple[int, float | None]], n: int, greater: bool) -> None:
    best = trainer.best_checkpoints()
    limit_0 = expected_disks([*saves, (0, None)], 1, n, greater)[-1] - {0}
    assert {entry.step for entry in best} == limit_0
    finite = [entry for entry in best if math.isfinite(entry.metric)]
    assert best[: len(finite)] == finite, "scores that are not finite come last"
    if finite:
        assert trainer.state.best_global_step == finite[0].step
        assert trainer.state.best_metric == finite[0].metric
        assert trainer.state.best_model_checkpoint == finite[0].path
        assert os.path.isdir(finite[0].path)
    else:
        assert trainer.state.best_model_checkpoint is None


def property_test(max_examples: int) -> Callable[[Any], Any]:
    def decorate(test: Any) -> Any:
        return settings(
            max_examples=max_examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(
            given(
                script=st.lists(METRICS, min_size=1, max_size=10),
                greater=st.booleans(),
                limit=st.sampled_from([None, 1, 2, 3, 4, 5]),
                n=st.integers(1, 5),
                cut=st.one_of(st.none(), st.integers(1, 9)),
                moves=st.booleans(),
            )(test)
        )

    return decorate


@property_test(max_examples=12)
@example([0.5, 0.5, None, NAN, 0.5, INF, 0.4, 0.3], False, 1, 2, 4, True)
@example([NAN, -INF, INF, None, NAN, 0.0], True, 1, 3, None, False)
@example([3.0, 2.0, 1.0, 0.0, 0.0], True, 2, 1, 3, False)
def test_after_every_save_the_folders_are_those_of_the_oracle(
    script: list[float | None], greater: bool, limit: int | None, n: int, cut: int | None, moves: bool
) -> None:
    check_against_oracle(script, greater, limit, n, cut, moves)


@pytest.mark.slow
@property_test(max_examples=200)
def test_after_every_save_of_many_more_runs_the_folders_are_those_of_the_oracle(
    script: list[float | None], greater: bool, limit: int | None, n: int, cut: int | None, moves: bool
) -> None:
    check_against_oracle(script, greater, limit, n, cut, moves)


def test_the_oracle_itself_can_tell_right_from_wrong() -> None:
    saves = [(1, 0.1), (2, NAN), (3, 0.3), (4, None)]
    assert expected_disks(saves, 1, 1, greater=True) == [{1}, {1, 2}, {3}, {3, 4}]
    assert expected_disks(saves, 1, 1, greater=False) == [{1}, {1, 2}, {1, 3}, {1, 4}]
    assert expected_disks(saves, None, 1, greater=False)[-1] == {1, 2, 3, 4}


# ---- single promises, by name


@pytest.fixture
def run(make_trainer: Any) -> Callable[..., tuple[Any, Recorder]]:
    """Return ``run(scores, ...)``: trains, evaluating to ``scores`` by step, and records what stands on disk."""

    def run(
        scores: dict[int, float], resume: Any = None, callbacks: Any = (), **options: Any
    ) -> tuple[Any, Recorder]:
        metric, recorder = MetricByStep(scores), Recorder()
        options = {"eval_on_save": True, "logging_strategy": "no", **BEST, **options}
        trainer = make_trainer(callbacks=[metric, *callbacks, recorder], compute_metrics=metric, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder

    return run


@pytest.mark.parametrize("load", [False, True])
def test_with_a_limit_of_one_the_last_and_the_best_are_both_there_at_the_end(
    run: Any, tmp_path: Path, load: bool
) -> None:
    trainer, _ = run({2: 0.1, 4: 0.9, 6: 0.5, 8: 0.2}, save_total_limit=1, load_best_model_at_end=load)
    assert checkpoint_steps(tmp_path / "out") == {4, 8}
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-4")


def test_when_the_last_is_the_best_it_alone_is_there_at_the_end(run: Any, tmp_path: Path) -> None:
    run({2: 0.1, 4: 0.2, 6: 0.5, 8: 0.9}, save_total_limit=1)
    assert checkpoint_steps(tmp_path / "out") == {8}


def test_saves_at_the_end_of_epochs_keep_the_last_and_the_best(run: Any, tmp_path: Path) -> None:
    _, recorder = run(
        {8: 0.9, 16: 0.1, 24: 0.2},
        save_strategy="epoch",
        num_train_epochs=3,
        max_steps=-1,
        save_total_limit=1,
    )
    assert recorder.disk == [{8}, {8, 16}, {8, 24}]
    assert checkpoint_steps(tmp_path / "out") == {8, 24}


def test_save_strategy_best_keeps_the_best_n_though_each_save_is_the_newest(run: Any, tmp_path: Path) -> None:
    _, recorder = run(
        {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.5, 10: NAN, 12: 0.7},
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=2,
        max_steps=12,
        save_total_limit=1,
        preserve_n_best=2,
    )
    assert recorder.disk == [{2}, {2, 4}, {4, 8}, {8, 12}]
    assert checkpoint_steps(tmp_path / "out") == {8, 12}


def test_after_an_old_run_left_higher_steps_the_new_ones_are_the_newest_and_its_scores_do_not_count(
    run: Any, tmp_path: Path
) -> None:
    run({10: 0.99, 20: 0.98}, save_steps=10, max_steps=20)
    _, recorder = run({2: 0.1, 4: 0.3, 6: 0.2}, save_steps=2, max_steps=6, save_total_limit=2)
    assert recorder.disk == [{2, 20}, {2, 4}, {4, 6}]
    assert checkpoint_steps(tmp_path / "out") == {4, 6}


def test_after_a_stock_run_left_higher_steps_the_new_ones_are_the_newest(
    run: Any, make_trainer: Any, tmp_path: Path
) -> None:
    make_trainer(
        trainer_class=Trainer, arguments_class=TrainingArguments, save_steps=10, max_steps=20
    ).train()
    trainer, recorder = run({2: 0.1, 4: 0.3, 6: 0.2}, save_steps=2, max_steps=6, save_total_limit=1)
    assert recorder.disk == [{2}, {4}, {4, 6}]
    assert trainer.state.best_global_step == 4


def test_going_back_to_an_older_checkpoint_leaves_the_other_branch_out_of_the_ranking(
    run: Any, tmp_path: Path
) -> None:
    run({2: 0.5, 4: 0.9, 6: 0.8}, max_steps=6)
    trainer, recorder = run(
        {4: 0.1, 6: 0.2},
        resume=str(tmp_path / "out" / "checkpoint-2"),
        max_steps=6,
        save_total_limit=1,
    )
    assert recorder.disk == [{2, 4}, {2, 6}], "the 0.8 and 0.9 of the other branch do not count"
    assert [(entry.step, entry.metric) for entry in trainer.best_checkpoints(9)] == [(2, 0.5), (6, 0.2)]


def test_a_resume_after_the_best_folder_was_deleted_by_hand_goes_on_without_it(
    run: Any, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    run({2: 0.9, 4: 0.1}, max_steps=4, callbacks=[AskAt(stop={4})])
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    trainer, recorder = run({6: 0.3, 8: 0.2}, resume=True, max_steps=8, save_total_limit=1)
    assert recorder.disk == [{6}, {6, 8}]
    assert trainer.state.best_global_step == 6
    assert trainer.state.best_metric == 0.3


def test_in_a_moved_output_folder_the_old_best_stays_best(run: Any, tmp_path: Path) -> None:
    run({2: 0.9, 4: 0.1}, max_steps=4)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    trainer, recorder = run(
        {6: 0.3, 8: 0.2},
        resume=True,
        output_dir=tmp_path / "moved",
        max_steps=8,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    assert recorder.disk == [{2, 6}, {2, 8}]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")
    assert trainer.state.best_metric == 0.9


def test_a_run_resumed_into_another_folder_leaves_the_old_folder_alone(run: Any, tmp_path: Path) -> None:
    run({2: 0.9, 4: 0.1}, max_steps=4)
    trainer, recorder = run(
        {6: 0.3, 8: 0.2},
        resume=str(tmp_path / "out" / "checkpoint-4"),
        output_dir=tmp_path / "other",
        max_steps=8,
        save_total_limit=1,
    )
    assert checkpoint_steps(tmp_path / "out") == {2, 4}
    assert recorder.disk == [{6}, {6, 8}]
    assert trainer.best_checkpoints()[0].path == str(tmp_path / "out" / "checkpoint-2")


def test_only_plain_checkpoint_folders_are_ever_deleted(run: Any, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    odd = [
        out / "checkpoint-best",
        out / "checkpoint-10.bak",
        out / "checkpoint-10-merged",
        out / "checkpoint-007",
        out / "checkpoint-",
        out / "checkpoint--1",
        out / "my-checkpoint-1",
        out / "nested" / "checkpoint-1",
        elsewhere,
    ]
    for folder in odd:
        folder.mkdir(parents=True)
        (folder / "kept.txt").write_text("kept")
    (out / "checkpoint-5").write_text("a file")
    (out / "checkpoint-7").symlink_to(elsewhere, target_is_directory=True)
    run({2: 0.1, 4: 0.3, 6: 0.2, 8: 0.1}, save_total_limit=1)
    assert all((folder / "kept.txt").read_text() == "kept" for folder in odd)
    assert (out / "checkpoint-5").read_text() == "a file"
    assert (out / "checkpoint-7").is_symlink()
    assert {p.name for p in out.glob("checkpoint-?") if p.is_dir() and not p.is_symlink()} == {
        "checkpoint-4",
        "checkpoint-8",
    }


def test_early_stopping_and_loading_the_best_work_with_it(run: Any, tmp_path: Path) -> None:
    trainer, _ = run(
        {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.4},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps",
        eval_steps=2,
        max_steps=20,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    assert trainer.state.global_step == 8
    assert checkpoint_steps(tmp_path / "out") == {4, 8}
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-4")


def test_the_best_model_is_in_memory_after_load_best_model_at_end(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        eval_on_save=True,
        preserve_best_model=True,
        load_best_model_at_end=True,
        save_total_limit=1,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_steps=12,
    )
    trainer.train()
    (best,) = trainer.best_checkpoints()
    assert best.step != 12, "the learning rate is meant to spoil the model"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best.metric, abs=1e-6)


# ---- without preserve_best_model


STOCK_PLANS = {
    "no limit": {},
    "a limit": {"save_total_limit": 2},
    "a limit of one": {"save_total_limit": 1},
    "a limit of one with the best loaded": {
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    },
    "a limit of two with the best loaded": {
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    },
    "a limit of one with a best that is not loaded": {
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    },
    "epochs": {"save_strategy": "epoch", "save_total_limit": 1, "max_steps": 24},
}


class Stateful(TrainerCallback):
    """Makes the checkpoints ours: its state is kept in them."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("options", STOCK_PLANS.values(), ids=STOCK_PLANS)
@pytest.mark.parametrize("callbacks", [[], [Stateful]], ids=["nothing of ours", "a stateful callback"])
def test_without_it_the_folders_after_every_save_are_those_of_the_stock_trainer(
    make_trainer: Any, tmp_path: Path, options: dict[str, Any], callbacks: list[Any]
) -> None:
    disks = []
    for cls, args in ((Trainer, TrainingArguments), (DivGuardTrainer, DivGuardTrainingArguments)):
        metric = MetricByStep({2: 0.1, 4: 0.9, 6: 0.5, 8: 0.4, 10: 0.3, 12: 0.2})
        recorder = Recorder()
        folder = tmp_path / cls.__name__
        trainer = make_trainer(
            folder,
            trainer_class=cls,
            arguments_class=args,
            callbacks=[metric, recorder, *(callback() for callback in callbacks)],
            compute_metrics=metric,
            **{"max_steps": 12, **options},
        )
        trainer.train()
        best = trainer.state.best_model_checkpoint
        disks.append(
            (recorder.disk, checkpoint_steps(folder), best and Path(best).name, trainer.state.best_metric)
        )
    assert disks[0] == disks[1]


# ---- hyperparameter search


def test_in_a_hyperparameter_search_each_run_folder_keeps_its_own(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    script = {0: {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.4}, 1: {2: 0.8, 4: 0.1, 6: 0.2, 8: 0.3}}
    trials: list[Any] = []
    disks: dict[str, list[set[int]]] = {}

    class NoteRuns(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for folder in Path(args.output_dir).glob("run-*"):
                disks.setdefault(folder.name, []).append(checkpoint_steps(folder))

    def space(trial: Any) -> dict[str, float]:
        trials.append(trial.number)
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}

    metric = MetricByStep(lambda step: script[trials[-1]][step])
    trainer = DivGuardTrainer(
        model_init=lambda: tiny_model(),
        args=DivGuardTrainingArguments(
            **base_arguments(tmp_path, save_total_limit=1, eval_on_save=True, logging_strategy="no", **BEST)
        ),
        train_dataset=TokenRows(),
        eval_dataset=TokenRows(4),
        callbacks=[metric, NoteRuns()],
        compute_metrics=metric,
    )
    trainer.hyperparameter_search(
        space, n_trials=2, direction="maximize", backend="optuna", compute_objective=lambda m: m["eval_score"]
    )
    assert checkpoint_steps(tmp_path / "run-0") == {4, 8}
    assert checkpoint_steps(tmp_path / "run-1") == {2, 8}
    assert disks["run-0"][:4] == [{2}, {4}, {4, 6}, {4, 8}]
    assert set(map(frozenset, disks["run-0"][4:])) == {frozenset({4, 8})}, "another trial touches nothing"
    assert disks["run-1"] == [{2}, {2, 4}, {2, 6}, {2, 8}]
    assert trainer.best_checkpoints()[0].path == str(tmp_path / "run-1" / "checkpoint-2")
