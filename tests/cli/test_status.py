"""``status``: how runs ended, what was lost, which checkpoint to take."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import find_checkpoints
from tests.cli.conftest import let_age, write_events

RunOf = Callable[[str], Path]


@pytest.mark.parametrize(
    ("name", "state", "code", "take"),
    [
        ("healthy", "finished", 0, 24),
        ("stopped", "diverged", 79, 12),
        ("rolled", "finished", 0, 24),
        ("given_up", "diverged", 79, None),
        ("killed", "stopped", 75, 16),
        ("stock", "finished", 0, 24),
        ("stock_nan", "diverged", 79, 12),
    ],
)
def test_the_state_of_each_run_and_the_checkpoint_to_take(
    cli: Any, made: Path, name: str, state: str, code: int, take: int | None
) -> None:
    answer = cli("status", made / name, "--json", "--exit-code")
    assert answer.code == code
    content = answer.json
    assert content["state"] == state
    if take is None:  # it depends on what the rollbacks did
        newest = [each for each in find_checkpoints(made / name) if each.verdict.status == "complete"][-1]
        take = newest.step
        assert take <= content["divergence"]["onset_step"] - 2
    assert content["take"]["path"] == str(made / name / f"checkpoint-{take}")
    assert content["take"]["verdict"] == "complete"
    assert content["max_steps"] == 24
    assert cli("status", made / name).code == 0
    text = cli("status", made / name).out
    assert f"{made / name}: {state}." in text
    assert f"take       {made / name / f'checkpoint-{take}'}" in text


def test_a_stop_names_kind_onset_loss_and_command(cli: Any, made: Path) -> None:
    run = made / "stopped"
    content = cli("status", run, "--json").json
    fault = content["divergence"]
    assert (fault["source"], fault["kind"], fault["onset_step"], fault["step"]) == (
        "events",
        "non_finite",
        14,
        14,
    )
    assert fault["value"] == "NaN"
    assert content["steps_lost"] == 2
    assert content["hours_lost"] > 0
    assert content["paste"] == f"--resume_from_checkpoint {run / 'checkpoint-12'}"
    assert content["newest"]["verdict"] == "quarantined"
    text = cli("status", run).out
    assert "finding    non_finite: `loss` = nan at step 14 is not a finite number." in text
    assert "lost       2 steps" in text


def test_rollbacks_are_counted_with_what_they_undid(cli: Any, made: Path) -> None:
    content = cli("status", made / "rolled", "--json").json
    assert (content["rollbacks"], content["steps_undone"]) == (1, 2)


def test_a_stock_run_is_judged_by_a_replay_of_its_log(cli: Any, made: Path) -> None:
    content = cli("status", made / "stock_nan", "--json").json
    assert content["divergence"]["source"] == "replay"
    assert content["divergence"]["onset_step"] == 14
    assert content["steps_lost"] == 12
    assert cli("status", made / "stock", "--json").json["divergence"] is None


def test_a_newest_checkpoint_from_after_the_fault_is_not_called_good(cli: Any, made: Path) -> None:
    """The stock Trainer marks none: its files are complete, its weights are not those to take."""
    run = made / "stock_nan"
    assert cli("status", run, "--json").json["newest"]["under_fault"] is True
    text = cli("status", run).out
    assert "its files are complete, but it was saved after the fault had begun (step 14)" in text
    assert "step 14, the detector `adaptive` would have found it at step" in text
    rows = cli("list", run, "--json").json["checkpoints"]
    assert [row["step"] for row in rows if row["under_fault"]] == [16, 20, 24]
    last = cli("list", run).out.splitlines()[-1]
    assert last == "Saved after the fault had begun (step 14): checkpoint-16, checkpoint-20, checkpoint-24."
    assert cli("status", made / "stock", "--json").json["newest"]["under_fault"] is False
    assert "Saved after" not in cli("list", made / "stock").out


def test_the_finding_is_said_once(cli: Any, made: Path) -> None:
    text = cli("status", made / "stopped").out
    finding = cli("status", made / "stopped", "--json").json["divergence"]["message"]
    assert text.count(finding) == 1
    assert text.splitlines()[0].endswith(": diverged. A detector stopped it at step 14 of 24.")


def test_disk_and_what_prune_would_free_agree_with_prune(cli: Any, made: Path) -> None:
    run = made / "stock"
    disk = cli("status", run, "--json").json["disk"]
    files = sum(path.stat().st_size for path in run.glob("checkpoint-*/**/*") if path.is_file())
    assert (disk["checkpoints"], disk["bytes"]) == (6, files)
    words = disk["prune"]["command"].split()[1:]
    pruned = cli(*words, "--json").json
    assert pruned["dry_run"] is True
    assert (disk["prune"]["checkpoints"], disk["prune"]["bytes"]) == (len(pruned["delete"]), pruned["bytes"])


def test_a_run_that_changed_just_now_is_running(cli: Any, run_of: RunOf) -> None:
    run = run_of("killed")
    assert cli("status", run, "--json").json["state"] == "stopped"
    (run / "runs").mkdir()
    (run / "runs" / "events").write_text("log")
    answer = cli("status", run, "--json", "--exit-code")
    assert (answer.code, answer.json["state"]) == (0, "running")
    assert answer.json["seconds_since_activity"] < 60
    assert answer.json["paste"] is None


def test_a_run_that_was_resumed_after_a_stop_is_not_diverged(cli: Any, run_of: RunOf) -> None:
    """It has saved beyond the step of the finding."""
    run = run_of("stopped")
    shutil.rmtree(run / "checkpoint-14")
    finding = {"step": 8, "onset_step": 8, "kind": "jump", "message": "A jump."}
    newest = json.loads((run / "checkpoint-12" / "divguard_manifest.json").read_text())["run_id"]
    (run / "divguard" / "outcome.json").unlink(missing_ok=True)
    own_state = (run / "trainer_state.json").read_text()
    (run / "trainer_state.json").unlink()
    write_events(run, {"run_id": newest, "event": "stopped", "step": 8, "finding": finding})
    let_age(run, 86_400)
    assert cli("status", run, "--json").json["state"] == "stopped"
    write_events(run, {"run_id": newest, "event": "stopped", "step": 12, "finding": finding})
    assert cli("status", run, "--json").json["state"] == "diverged"
    (run / "trainer_state.json").write_text(own_state)
    time.sleep(0.01)
    write_events(run, {"run_id": newest, "event": "stopped", "step": 12, "undone_by_resume_from": 8})
    let_age(run, 86_400)
    assert cli("status", run, "--json").json["state"] == "stopped"


@pytest.mark.parametrize(
    ("outcome", "state", "code"),
    [
        ({"version": 1, "status": "finished", "step": 24}, "finished", 0),
        ({"version": 1, "status": "ended_early", "step": 16, "reason": "Early stopping."}, "finished", 0),
        ({"version": 1, "status": "stopped", "step": 24}, "diverged", 79),
        ({"version": 1, "status": "gave_up", "step": 24}, "diverged", 79),
        ({"version": 1, "status": "interrupted", "step": 24}, "stopped", 75),
        ({"status": "failed", "step": 24}, "failed", 70),
        ({"version": 1, "status": "finished", "step": 8}, "stopped", 75),  # of an older training
        ({"version": 1, "status": ["finished"], "step": "8"}, "stopped", 75),
        ([], "stopped", 75),
    ],
)
def test_the_outcome_file_says_how_a_run_ended(
    cli: Any, run_of: RunOf, outcome: Any, state: str, code: int
) -> None:
    run = run_of("killed")
    (run / "divguard").mkdir(exist_ok=True)
    (run / "divguard" / "outcome.json").write_text(json.dumps(outcome))
    let_age(run, 86_400)
    answer = cli("status", run, "--json", "--exit-code")
    assert (answer.json["state"], answer.code) == (state, code)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "null",
        "[" * 100_000,
        '{"event": ["stopped"], "step": {}}',
        '{"event": "stopped", "step": -5}',
        '{"event": "stopped", "step": 1e400, "finding": 3}',
        '{"event": "stopped", "step": 24, "finding": {"step": "x", "message": 5, "value": {}, "evidence": []}}',
        '{"event": "rollback", "step": 12, "steps_lost": "many", "incident": {}, "target_step": null}',
    ],
)
def test_broken_events_give_an_answer(cli: Any, run_of: RunOf, line: str) -> None:
    run = run_of("killed")
    (run / "divguard").mkdir(exist_ok=True)
    (run / "divguard" / "events.jsonl").write_text(line + "\n")
    assert cli("status", run).code == 0
    assert cli("status", run, "--json").json["state"] in ("stopped", "diverged", "running")


def test_files_that_are_fifos_do_not_hang_it(cli: Any, run_of: RunOf) -> None:
    run = run_of("killed")
    (run / "divguard").mkdir(exist_ok=True)
    for name in ("divguard/events.jsonl", "divguard/outcome.json", "trainer_state.json"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    assert cli("status", run, "--json").json["take"]["step"] == 16


def test_a_damaged_newest_checkpoint_is_named_and_not_taken(cli: Any, run_of: RunOf) -> None:
    run = run_of("killed")
    os.truncate(run / "checkpoint-16" / "model.safetensors", 10)
    let_age(run, 86_400)
    content = cli("status", run, "--json").json
    assert content["newest"]["verdict"] == "incomplete"
    assert "model.safetensors" in content["newest"]["reason"]
    assert content["take"]["step"] == 12
    assert content["steps_lost"] == 4


def test_without_a_good_checkpoint_it_says_so(cli: Any, run_of: RunOf) -> None:
    run = run_of("killed")
    for folder in run.glob("checkpoint-*"):
        (folder / "model.safetensors").unlink()
    content = cli("status", run, "--json").json
    assert (content["take"], content["paste"]) == (None, None)
    assert "none of the 4 checkpoints is complete" in cli("status", run).out


def test_a_run_without_checkpoints_is_judged_by_its_trainer_state(cli: Any, tmp_path: Path) -> None:
    log = [{"loss": 2.0, "step": 10}, {"train_runtime": 9.0, "step": 20}]
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"global_step": 20, "max_steps": 50, "log_history": log})
    )
    content = cli("status", tmp_path, "--json").json
    assert content["state"] == "finished"
    assert "before its last step" in content["reason"]
    assert content["newest"] is None


def test_a_trainer_state_of_many_lines_is_read_at_its_ends(cli: Any, run_of: RunOf) -> None:
    run = run_of("killed")
    path = run / "checkpoint-16" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"] = [{"loss": 2.0, "grad_norm": 1.0, "step": step} for step in range(150_000)]
    path.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
    assert path.stat().st_size > 8 << 20
    (run / "checkpoint-16" / "divguard_manifest.json").unlink()
    (run / "checkpoint-16" / "divguard_state.json").unlink()
    began = time.perf_counter()
    content = cli("status", run, "--json").json
    assert time.perf_counter() - began < 20
    assert (content["step"], content["max_steps"]) == (16, 24)
    assert "hf-divguard replay" in content["replay"]


def test_a_spike_from_which_the_loss_recovered_is_no_divergence(cli: Any, tmp_path: Path) -> None:
    losses = [3.0 - step * 0.01 for step in range(100)]
    losses[50:60] = [9.0] * 10
    log = [{"loss": loss, "grad_norm": 1.0, "step": step} for step, loss in enumerate(losses, start=1)]
    state = {"global_step": 100, "max_steps": 100, "log_history": log}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    content = cli("status", tmp_path, "--json").json
    assert content["state"] == "finished"
    assert "recovered" in content["replay"]
