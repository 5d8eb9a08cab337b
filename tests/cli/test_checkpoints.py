"""``list``, ``best``, ``latest`` and ``verify``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard import best_checkpoints, latest_complete_checkpoint

RunOf = Callable[[str], Path]


def test_the_list_has_step_metric_age_size_verdict_and_reason(cli: Any, made: Path) -> None:
    rows = cli("list", made / "stopped", "--json").json["checkpoints"]
    assert [row["step"] for row in rows] == [4, 8, 12, 14]
    assert [row["verdict"] for row in rows] == ["complete"] * 3 + ["quarantined"]
    assert [row["metric"] for row in rows][-1] == "NaN"
    assert all(80_000 < row["age_seconds"] < 100_000 for row in rows)
    for row in rows:
        assert row["bytes"] == sum(path.stat().st_size for path in Path(row["path"]).iterdir())
    assert rows[0]["kept"] is None
    assert rows[2]["kept"] == "the last good one before the fault at step 14; newest complete; best"
    text = cli("list", made / "stopped").out.splitlines()
    assert text[0].split()[:5] == ["step", "eval_loss", "age", "size", "verdict"]
    assert text[-1].startswith("checkpoint-14: It is quarantined")


def test_the_list_names_the_rules_that_keep(cli: Any, made: Path) -> None:
    rows = cli("list", made / "stock", "--json", "--keep-last", 3, "--keep-best", 2, "--every", 8).json
    assert {row["step"]: row["kept"] for row in rows["checkpoints"]} == {
        4: None,
        8: "every 8",
        12: None,
        16: "last 3; every 8",
        20: "last 3; best 2 of 2",
        24: "newest complete; best 1 of 2; every 8",
    }


def test_best_and_latest_print_what_the_functions_return(cli: Any, made: Path) -> None:
    for name in ("healthy", "stopped", "rolled", "stock"):
        run = made / name
        assert cli("best", run).out == best_checkpoints(run, 1)[0].path + "\n"
        newest = latest_complete_checkpoint(run)
        assert newest is not None
        assert cli("latest", run).out == newest.path + "\n"
    three = cli("best", made / "stock", "-n", 3).out.split()
    assert three == [each.path for each in best_checkpoints(made / "stock", 3)]


def test_best_and_latest_pass_over_what_a_replay_shows_to_be_diverged(
    cli: Any, made: Path, run_of: RunOf
) -> None:
    run = made / "stock_nan"
    take = cli("status", run, "--json").json["take"]["path"]
    newest = latest_complete_checkpoint(run)
    assert newest is not None
    assert newest.step > 14
    for command in ("latest", "best"):
        answer = cli(command, run)
        assert answer.code == 0
        assert int(answer.out.strip().rpartition("-")[2]) <= 12
        assert "passed over" in answer.err
        assert "from step 14 on" in answer.err
    assert cli("latest", run).out == f"{take}\n"
    copy = run_of("stock_nan")
    for folder in copy.glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) <= 12:
            shutil.rmtree(folder)
    answer = cli("latest", copy)
    assert (answer.code, answer.out) == (1, "")
    assert "no good checkpoint is from before the onset (step 14)" in answer.err


def test_best_and_latest_exit_with_1_where_there_is_none(cli: Any, run_of: RunOf) -> None:
    run = run_of("stock")
    for folder in run.glob("checkpoint-*"):
        (folder / "model.safetensors").unlink()
    for command in ("best", "latest"):
        answer = cli(command, run)
        assert (answer.code, answer.out) == (1, "")
        assert "None of the 6 checkpoints" in answer.err


def test_best_without_evaluations_says_what_to_do(cli: Any, made: Path) -> None:
    answer = cli("best", made / "stock", "--metric", "accuracy")
    assert answer.code == 1
    assert "`eval_on_save=True`" in answer.err
    answer = cli("best", made / "stock", "--metric", "zork")
    assert answer.code == 2
    assert "--greater-is-better" in answer.err


def test_best_skips_one_that_was_changed(cli: Any, run_of: RunOf) -> None:
    run = run_of("stock")
    os.truncate(run / "checkpoint-24" / "model.safetensors", 50)
    assert cli("best", run).out == str(run / "checkpoint-20") + "\n"


def test_verify_takes_checkpoints_and_output_folders(cli: Any, run_of: RunOf) -> None:
    run = run_of("healthy")
    assert cli("verify", run).code == 0
    assert cli("verify", run / "checkpoint-4", run / "checkpoint-8").code == 0
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    answer = cli("verify", run, "--json")
    assert answer.code == 1
    verdicts = {Path(each["path"]).name: each["verdict"] for each in answer.json["checkpoints"]}
    assert verdicts["checkpoint-4"] == "incomplete"
    assert list(verdicts.values()).count("complete") == 5
    assert "optimizer.pt" in cli("verify", run / "checkpoint-4").out


def test_verify_with_checksums_finds_a_changed_byte(cli: Any, run_of: RunOf) -> None:
    """The archives of a stock checkpoint have checksums of their own."""
    run = run_of("stock")
    path = run / "checkpoint-24" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert cli("verify", run / "checkpoint-24").code == 0
    assert cli("verify", run / "checkpoint-24", "--checksum").code == 1


def test_a_renamed_checkpoint_can_be_verified(cli: Any, run_of: RunOf) -> None:
    run = run_of("stock")
    (run / "checkpoint-24").rename(run / "final")
    assert cli("verify", run / "final").code == 0


@pytest.mark.parametrize("content", ["", "{", "null", '{"step": {}}'])
def test_a_broken_manifest_gives_a_verdict(cli: Any, run_of: RunOf, content: str) -> None:
    run = run_of("healthy")
    (run / "checkpoint-24" / "divguard_manifest.json").write_text(content)
    assert cli("verify", run / "checkpoint-24").code == 1
    for command in ("list", "status", "prune"):
        assert cli(command, run).code == 0
    assert cli("latest", run).out == str(run / "checkpoint-20") + "\n"
