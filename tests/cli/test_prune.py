"""``prune``: what it deletes, and what it never does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from hf_divguard import verify_checkpoint
from hf_divguard.storage.deletion import delete_checkpoint
from hf_divguard.storage.failpoints import watch_failpoints
from hf_divguard.storage.weights_only import reduce_to_weights
from tests.cli.conftest import let_age
from tests.storage.conftest import tree
from tests.tiny import checkpoint_steps

RunOf = Callable[[str], Path]


@pytest.mark.parametrize("name", ["stock", "healthy", "stopped", "rolled", "given_up", "killed"])
def test_without_yes_nothing_is_touched(cli: Any, run_of: RunOf, name: str) -> None:
    run = run_of(name)
    before = tree(run)
    answer = cli("prune", run, "--keep-last", 1, "--keep-best", 0)
    assert answer.code == 0
    assert "--yes" in answer.out
    assert tree(run) == before


def test_with_yes_it_does_what_it_announced(cli: Any, run_of: RunOf) -> None:
    run = run_of("stock")
    announced = cli("prune", run, "--json", "--every", 8).json
    kept = {each["step"] for each in announced["keep"]}
    assert kept == {8, 16, 20, 24}
    before = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    answer = cli("prune", run, "--every", 8, "--yes", "--json")
    assert answer.code == 0
    assert checkpoint_steps(run) == kept
    assert [each["deleted"] for each in answer.json["delete"]] == [True, True]
    after = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert before - after == announced["bytes"]


def test_the_command_that_it_prints_can_be_pasted(cli: Any, run_of: RunOf) -> None:
    run = run_of("stock")
    command = cli("prune", run, "--keep-last", 1, "--keep-best", 2).out.splitlines()[-1].split()
    assert command[0] == "hf-divguard"
    assert cli(*command[1:]).code == 0
    assert checkpoint_steps(run) == {20, 24}


def test_what_a_stopped_run_needs_stays(cli: Any, run_of: RunOf) -> None:
    """The last good one before the fault, and what the last incident restored."""
    run = run_of("given_up")
    taken = cli("status", run, "--json").json["take"]["step"]
    cli("prune", run, "--keep-last", 1, "--keep-best", 0, "--yes")
    assert taken in checkpoint_steps(run)
    run = run_of("rolled")
    cli("prune", run, "--keep-last", 1, "--keep-best", 0, "--yes")
    assert checkpoint_steps(run) == {12, 24}
    run = run_of("stock_nan")
    cli("prune", run, "--keep-last", 1, "--keep-best", 0, "--yes")
    assert checkpoint_steps(run) == {12, 24}


def test_the_only_complete_one_stays(cli: Any, run_of: RunOf) -> None:
    run = run_of("stock")
    for step in (8, 12, 16, 20, 24):
        (run / f"checkpoint-{step}" / "model.safetensors").unlink()
    let_age(run, 86_400)
    cli("prune", run, "--keep-last", 1, "--yes")
    assert 4 in checkpoint_steps(run)


def test_where_none_is_complete_nothing_is_deleted(cli: Any, run_of: RunOf) -> None:
    run = run_of("stopped")
    for step in (4, 8, 12):
        shutil.rmtree(run / f"checkpoint-{step}")
    let_age(run, 86_400)
    before = tree(run)
    answer = cli("prune", run, "--keep-last", 1, "--yes")
    assert "No checkpoint is complete, so none is deleted." in answer.out
    assert tree(run) == before


def test_what_is_being_written_stays(cli: Any, run_of: RunOf) -> None:
    run = run_of("stock")
    (run / "checkpoint-4" / "model.safetensors").unlink()  # which changes the time of the folder
    answer = cli("prune", run, "--keep-last", 1, "--json").json
    assert {each["step"]: each["why"] for each in answer["keep"]}[4] == "may still be written"
    let_age(run, 86_400)
    assert 4 in {each["step"] for each in cli("prune", run, "--keep-last", 1, "--json").json["delete"]}


def test_links_and_what_they_lead_to_stay(cli: Any, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of("stock")
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoint-4").rename(elsewhere)
    os.symlink(elsewhere, run / "checkpoint-4")
    other = Path(shutil.copytree(run / "checkpoint-8", tmp_path / "other"))
    (run / "checkpoint-8" / "link").symlink_to(other)
    outside = tree(tmp_path / "elsewhere"), tree(other)
    assert cli("prune", run, "--keep-last", 1, "--yes").code == 0
    assert (run / "checkpoint-4").is_symlink()
    assert not (run / "checkpoint-8").exists()
    assert (tree(elsewhere), tree(other)) == outside


def test_other_names_are_never_touched(cli: Any, run_of: RunOf) -> None:
    run = run_of("stock")
    for name in ("checkpoint-4.bak", "checkpoint-04", "checkpoint-best", "final"):
        shutil.copytree(run / "checkpoint-4", run / name)
    (run / "checkpoint-2").write_text("a file")
    assert cli("prune", run, "--keep-last", 1, "--yes").code == 0
    names = {path.name for path in run.iterdir()}
    assert {"checkpoint-4.bak", "checkpoint-04", "checkpoint-best", "final", "checkpoint-2"} <= names


def test_the_best_of_the_trainer_itself_stays(cli: Any, run_of: RunOf) -> None:
    """`load_best_model_at_end` will want it."""
    run = run_of("killed")
    path = run / "checkpoint-16" / "trainer_state.json"
    best = '"best_model_checkpoint": '
    path.write_text(path.read_text().replace(f"{best}null", f'{best}"/old/checkpoint-8"'))
    keep = cli("prune", run, "--keep-last", 1, "--keep-best", 0, "--json").json["keep"]
    assert {each["step"]: each["why"] for each in keep}[8] == "the Trainer's own best checkpoint"


def test_hard_links_with_a_name_elsewhere_free_nothing(cli: Any, run_of: RunOf, tmp_path: Path) -> None:
    run = run_of("stock")
    before = cli("prune", run, "--json").json["bytes"]
    model = run / "checkpoint-4" / "model.safetensors"
    os.link(model, tmp_path / "copy")
    assert before - cli("prune", run, "--json").json["bytes"] == model.stat().st_size


def test_what_could_not_be_deleted_is_not_counted_as_freed(
    cli: Any, run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: str, output_dir: str) -> None:
        if path.endswith("checkpoint-4"):
            raise OSError("the disk refuses")
        delete_checkpoint(path, output_dir)

    run = run_of("stock")
    monkeypatch.setattr("hf_divguard.cli.prune.delete_checkpoint", refuses)
    before = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    answer = cli("prune", run, "--yes", "--json")
    assert answer.code == 1
    assert 4 in checkpoint_steps(run)
    after = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert answer.json["bytes"] == before - after > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--keep-last", "0"), "`--keep-last` must be at least 1, got 0."),
        (("--keep-best", "-1"), "`--keep-best` must be at least 0, got -1."),
        (("--every", "0"), "`--every` must be at least 1, got 0."),
        (("--metric", "zork"), "the best cannot be kept"),
    ],
)
def test_rules_that_make_no_sense_are_refused(
    cli: Any, run_of: RunOf, words: tuple[str, ...], says: str
) -> None:
    run = run_of("stock")
    before = tree(run)
    answer = cli("prune", run, *words, "--yes")
    assert answer.code == 2
    assert says in answer.err
    assert tree(run) == before


# ---- weights only


def test_old_ones_that_stay_are_reduced_to_their_weights(cli: Any, run_of: RunOf) -> None:
    run = run_of("healthy")
    rules = ("--keep-last", 1, "--keep-best", 2, "--weights-only-older-than", "12h")
    before = tree(run)
    announced = cli("prune", run, *rules, "--json").json
    assert tree(run) == before
    reduced = {each["step"] for each in announced["weights_only"]}
    kept = {each["step"] for each in announced["keep"]}
    assert reduced
    assert reduced == kept - {max(kept)}
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    best = cli("best", run, "-n", 2).out
    answer = cli("prune", run, *rules, "--yes", "--json")
    assert (answer.code, answer.json["bytes"]) == (0, announced["bytes"])
    # A manifest that lists fewer files is shorter.
    after = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert 0 <= size - after - announced["bytes"] < 2000
    for step in reduced:
        checkpoint = run / f"checkpoint-{step}"
        assert not [path.name for path in checkpoint.glob("*.pt*")]
        assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() > 0
        verdict = verify_checkpoint(checkpoint, checksums=True)
        assert (verdict.status, verdict.loadable, verdict.resumable) == ("complete", True, False)
    # The newest one can still be resumed, and the best are still the best.
    assert cli("best", run, "-n", 2).out == best
    assert cli("status", run, "--json").json["take"]["step"] == max(kept)
    assert cli("prune", run, *rules, "--yes", "--json").json["weights_only"] == []


def test_the_command_that_reduces_can_be_pasted(cli: Any, run_of: RunOf) -> None:
    run = run_of("healthy")
    command = (
        cli("prune", run, "--keep-last", 1, "--keep-best", 3, "--weights-only-older-than", "0.5d")
        .out.splitlines()[-1]
        .split()
    )
    answer = cli(*command[1:])
    assert answer.code == 0
    assert "reduced" in answer.out


def test_what_a_fault_needs_and_young_ones_stay_in_full(cli: Any, run_of: RunOf) -> None:
    run = run_of("stopped")
    taken = cli("status", run, "--json").json["take"]["step"]
    cli("prune", run, "--keep-best", 2, "--weights-only-older-than", "1m", "--yes")
    assert verify_checkpoint(run / f"checkpoint-{taken}").resumable
    run = run_of("healthy")
    assert cli("prune", run, "--weights-only-older-than", "3d", "--json").json["weights_only"] == []


def test_without_a_manifest_nothing_is_reduced(cli: Any, run_of: RunOf) -> None:
    run = run_of("stock")
    answer = cli("prune", run, "--keep-best", 3, "--weights-only-older-than", "1h", "--json").json
    assert answer["weights_only"] == []
    assert "is not reduced to its weights: it has no manifest." in "".join(answer["notes"])


@pytest.mark.parametrize("age", ["7", "-1d", "week", "1e3h", "", "0x1d"])
def test_an_age_that_is_none_is_refused(cli: Any, run_of: RunOf, age: str) -> None:
    answer = cli("prune", run_of("healthy"), f"--weights-only-older-than={age}")
    assert answer.code == 2
    assert f"such as 45m, 12h or 7d, got {age!r}" in answer.err


def test_killed_after_the_new_manifest_it_is_complete(run_of: RunOf) -> None:
    run = run_of("healthy")
    checkpoint = next(iter(sorted(run.glob("checkpoint-*"))))

    def interrupt(name: str) -> None:
        if name == "manifest reduced":
            raise KeyboardInterrupt

    with watch_failpoints(interrupt), pytest.raises(KeyboardInterrupt):
        reduce_to_weights(checkpoint)
    verdict = verify_checkpoint(checkpoint)
    assert (verdict.status, verdict.resumable) == ("complete", False)
    assert (checkpoint / "optimizer.pt").exists()
    assert reduce_to_weights(checkpoint) > 0
    assert not (checkpoint / "optimizer.pt").exists()
    assert verify_checkpoint(checkpoint).status == "complete"
