"""The folder of an incident: what is in it, what is not, and that it stays small."""

from __future__ import annotations

import csv
import json
import logging
import math
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hf_divguard import NonFiniteDetector
from hf_divguard.core.private import HIDDEN
from hf_divguard.hf.detectors import DivergenceDetector
from hf_divguard.storage.incident_folder import incident_folders, remove_old_incidents, write_incident
from tests.hf.faults import QUICK, NaNBatch, ScriptedRule
from tests.tiny import VOCABULARY, tiny_model

MakeTrainer = Callable[..., Any]


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "incident.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def stopped(make_trainer: MakeTrainer, step: int = 7, **options: Any) -> Any:
    """Train until a NaN at ``step`` stops the run."""
    model = tiny_model()
    callbacks = [NaNBatch(model, range(step, step + 1)), NonFiniteDetector(action="stop")]
    options = {**QUICK, "divguard_skip_nonfinite": False, **options}
    trainer = make_trainer(model=model, callbacks=callbacks, **options)
    trainer.train()
    return trainer


def test_it_holds_finding_values_arguments_and_versions_without_secrets(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = stopped(
        make_trainer, hub_token="hf_SECRETSECRETSECRET", run_name="https://me:SECRET@example.org", seed=3
    )
    [(step, folder)] = incident_folders(tmp_path / "out").items()
    content = content_of(folder)
    assert step == 7
    assert content["event"] == trainer.divguard_events[0]
    assert content["steps"] == {"onset": 7, "last": 7}
    assert content["arguments"]["seed"] == 3
    assert content["arguments"]["run_name"] == HIDDEN
    assert content["versions"].keys() >= {"python", "torch", "transformers", "hf_divguard"}
    assert content["text"] == []
    assert all("SECRET" not in path.read_text() for path in folder.iterdir())
    rows = list(csv.DictReader((folder / "values.csv").open()))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [float(row["loss"]) for row in rows[:6]] == pytest.approx(losses[:6], abs=1e-3)
    assert math.isnan(float(rows[6]["loss"]))
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [float(row["grad_norm"]) for row in rows[:6]] == pytest.approx(norms[:6], rel=1e-4)


def test_the_rates_are_those_of_the_updates(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    stopped(make_trainer, step=4, learning_rate=1e-3)  # falls linearly to 0 in 24 steps
    rows = list(csv.DictReader((tmp_path / "out" / "divguard" / "incident-4" / "values.csv").open()))
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(
        [1e-3 * (24 - step) / 24 for step in range(4)]
    )


def test_the_picture_is_an_image_with_three_curves_and_the_marks(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    stopped(make_trainer)
    tree = xml.etree.ElementTree.parse(tmp_path / "out" / "divguard" / "incident-7" / "curves.svg")
    tags = [each.tag.rpartition("}")[2] for each in tree.iter()]
    assert tags.count("polyline") == 3
    words = " ".join(each.text or "" for each in tree.iter())
    for word in ("loss", "grad_norm", "learning_rate", "onset 7", "stopped 7"):
        assert word in words


def test_text_is_there_only_if_asked_for(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = stopped(make_trainer, divguard_incident_text=True)
    texts = content_of(tmp_path / "out" / "divguard" / "incident-7")["text"]
    assert [(each["step"], each["micro_batch"], each["row"]) for each in texts] == [
        (7, 0, row) for row in range(4)
    ]
    known = {tuple(row.tolist()) for row in trainer.train_dataset.rows}
    assert {tuple(each["tokens"]) for each in texts} <= known


def test_rows_are_decoded_by_the_tokenizer_of_the_trainer(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({f"word{number}": number for number in range(VOCABULARY)}))
    model = tiny_model()
    trainer = make_trainer(
        model=model,
        callbacks=[NaNBatch(model, range(3, 4)), NonFiniteDetector(action="abort")],
        **QUICK,
        divguard_skip_nonfinite=False,
        divguard_incident_text=True,
    )
    trainer.processing_class = PreTrainedTokenizerFast(tokenizer_object=inner)
    trainer.train()
    [first, *_] = content_of(tmp_path / "out" / "divguard" / "incident-3")["text"]
    assert first["text"].startswith("word")
    assert first["tokens"] is None


def test_only_so_many_are_kept(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Flickering(ScriptedRule):
        """Finds something at every second step."""

    trainer = make_trainer(
        callbacks=[DivergenceDetector(Flickering({step: step for step in (2, 4, 6, 8)}), action="warn")],
        divguard_incidents=2,
    )
    trainer.train()
    assert len(trainer.divguard_events) == 4
    assert list(incident_folders(tmp_path / "out")) == [6, 8]


def test_none_are_written_where_none_are_wanted_and_none_by_a_healthy_run(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    stopped(make_trainer, divguard_incidents=0)
    assert incident_folders(tmp_path / "out") == {}
    make_trainer(tmp_path / "healthy", divguard_detector="adaptive").train()
    assert not (tmp_path / "healthy" / "divguard" / "events.jsonl").exists()
    assert incident_folders(tmp_path / "healthy") == {}


def test_a_record_that_cannot_be_written_ends_nothing(
    make_trainer: MakeTrainer, tmp_path: Path, our_log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out" / "divguard").mkdir(parents=True)
    (tmp_path / "out" / "divguard" / "incident-5").write_text("a file in its place")
    trainer = make_trainer(callbacks=[DivergenceDetector(ScriptedRule({5: 5}), action="warn")])
    trainer.train()
    assert trainer.state.global_step == 8
    warnings = [each for each in our_log.records if each.levelno == logging.WARNING]
    assert (
        sum("The record of the incident at step 5 could not be written" in each.message for each in warnings)
        == 1
    )


def test_a_long_run_leaves_a_small_folder(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(
        max_steps=600,
        save_strategy="no",
        logging_steps=50,
        callbacks=[NonFiniteDetector(), DivergenceDetector(ScriptedRule({600: 590}), action="warn")],
    ).train()
    folder = tmp_path / "out" / "divguard" / "incident-600"
    rows = list(csv.DictReader((folder / "values.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(89, 601))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 150_000


def test_what_json_cannot_hold_becomes_text(tmp_path: Path) -> None:
    folder = write_incident(tmp_path, 3, {"set": {1}, "nan": math.nan}, columns=["step"], rows=[], picture="")
    assert content_of(folder) == {"set": "{1}", "nan": {"__float__": "NaN"}}


def test_a_folder_that_holds_another_one_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_incident(tmp_path, step, {}, columns=["step"], rows=[], picture="")
    (tmp_path / "divguard" / "incident-1" / "notes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "divguard" / "incident-9").symlink_to(tmp_path / "elsewhere")
    remove_old_incidents(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "divguard").iterdir()) == [
        "incident-1",
        "incident-3",
        "incident-9",
    ]
