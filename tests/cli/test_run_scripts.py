"""``run`` guards scripts of many kinds that nobody changed: TRL's command line, run_clm, run_glue, PEFT, and others.

Each is run alone, guarded, and guarded with one row of its data that makes the loss NaN. TRL and
sentence-transformers are in the extras of these names (``make test-trl``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_divguard.storage.events import read_events
from hf_divguard.storage.outcome_file import read_outcome
from tests.cli.test_run import GUARDED, call, log_of
from tests.processes import run_python
from tests.tiny import same_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(TrainingArguments, "train_sampling_strategy"),
        reason="this version of Transformers cannot take the rows in their order, which says where the fault comes",
    ),
]

ROLLBACK = [
    "--divguard_action=rollback",
    "--divguard_check_steps=1",
    "--divguard_cooldown_steps=1",
    "--divguard_skip_nonfinite=false",
]
STEPS, BROKEN_STEP = 14, 11
FLAGS = (
    f"--max_steps {STEPS} --per_device_train_batch_size 4 --logging_steps 1 --save_steps 2 --use_cpu --seed 7 "
    "--train_sampling_strategy sequential --report_to none --learning_rate 1e-2 --disable_tqdm true"
).split()
HIDDEN_SIZE = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models and data."""
    folder = tmp_path_factory.mktemp("files")
    done = run_python("-W", "ignore", "-m", "tests.cli.scripts.make_files", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def python(name: str, *words: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", f"tests.cli.scripts.{name}", *map(str, words)]


def trl(kind: str, model: str, data: str) -> Callable[[Path, Path, str], list[str]]:
    """Return the command of TRL for a kind of training."""

    def command(files: Path, out: Path, end: str) -> list[str]:
        program = os.path.join(os.path.dirname(sys.executable), "trl")
        words = ["--model_name_or_path", files / model, "--dataset_name", files / f"{data}{end}"]
        off = ["--bf16", "false", "--gradient_checkpointing", "false"]
        return [program, kind, *map(str, words), "--output_dir", str(out), *FLAGS, *off]

    return command


def clm(files: Path, out: Path, end: str) -> list[str]:
    words = ("--model_name_or_path", files / "causal", "--train_file", files / f"text{end}.txt")
    return python("clm", *words, "--output_dir", out, *FLAGS)


def glue(files: Path, out: Path, end: str) -> list[str]:
    data = ("--train_file", files / f"classes{end}.csv", "--validation_file", files / "classes.csv")
    evaluates = ("--eval_strategy", "steps", "--eval_steps", "4")
    return python(
        "glue", "--model_name_or_path", files / "classifier", *data, *evaluates, "--output_dir", out, *FLAGS
    )


def lora(files: Path, out: Path, end: str) -> list[str]:
    return python("lora", files / "causal", files / f"text{end}.txt", "--output_dir", out, *FLAGS)


def sentences(files: Path, out: Path, end: str) -> list[str]:
    return python("sentences", files / "classifier", files / f"pairs{end}", out)


def needs(package: str, *values: Any, id: str) -> Any:
    is_there = importlib.util.find_spec(package) is not None
    reason = f"{package} is not installed: pip install -e '.[trl,sentence-transformers]'"
    return pytest.param(*values, marks=pytest.mark.skipif(not is_there, reason=reason), id=id)


SCRIPTS = [
    pytest.param(clm, id="run_clm"),
    pytest.param(glue, id="run_glue"),
    needs("peft", lora, id="peft"),
    needs("trl", trl("sft", "causal", "sft"), id="trl sft"),
    needs("trl", trl("dpo", "causal", "dpo"), id="trl dpo"),
    needs("trl", trl("reward", "reward", "ranked"), id="trl reward"),
    needs("trl", trl("kto", "causal", "kto"), id="trl kto"),
    needs("sentence_transformers", sentences, id="sentence-transformers"),
]


def run(command: list[str], options: list[str] | None) -> None:
    words = command if options is None else [*GUARDED, *options, "--", *command]
    done = call(*words, TRANSFORMERS_VERBOSITY="error", HF_DATASETS_OFFLINE="1")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "nothing was guarded" not in done.stderr


def weights_in(folder: Path) -> dict[str, Any]:
    [path] = sorted(folder.rglob(f"checkpoint-{STEPS}/*model.safetensors"))
    return load_file(path)


def bad_values(weights: dict[str, Any]) -> int:
    return sum(int((~each.isfinite()).sum()) for each in weights.values())


def entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the log without memory and speed, which no two runs have in common."""
    for entry in log_of(folder):
        yield {key: value for key, value in entry.items() if "_mem_" not in key and "time" not in key}


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_healthy_run_is_the_one_of_the_command_alone_to_the_last_bit(
    files: Path, tmp_path: Path, command: Callable[[Path, Path, str], list[str]]
) -> None:
    run(command(files, tmp_path / "alone", ""), None)
    run(command(files, tmp_path / "guarded", ""), ROLLBACK)
    alone, guarded = weights_in(tmp_path / "alone"), weights_in(tmp_path / "guarded")
    for name in alone:  # the poisoned word itself is NaN in both
        alone[name], guarded[name] = alone[name].nan_to_num(7.0), guarded[name].nan_to_num(7.0)
    assert same_weights(alone, guarded)
    state = f"checkpoint-{STEPS}"
    assert list(entries(tmp_path / "alone" / state)) == list(entries(tmp_path / "guarded" / state))
    assert read_events(tmp_path / "guarded") == []
    end = read_outcome(tmp_path / "guarded")
    assert end is not None
    assert (end.status, end.step) == ("finished", STEPS)


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_row_that_makes_the_loss_nan_is_rolled_back(
    files: Path, tmp_path: Path, command: Callable[[Path, Path, str], list[str]]
) -> None:
    run(command(files, tmp_path, "-broken"), ROLLBACK)
    rollbacks = [event for event in read_events(tmp_path) if event["event"] == "rollback"]
    assert rollbacks
    assert rollbacks[0]["onset_step"] == BROKEN_STEP
    assert rollbacks[0]["finding"]["kind"] == "non_finite"
    assert bad_values(weights_in(tmp_path)) in (0, HIDDEN_SIZE)
    log = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry and entry["step"] > rollbacks[-1]["step"]]
    assert losses
    assert all(0.0 < loss < 20.0 for loss in losses)
    assert read_outcome(tmp_path).status == "finished"  # type: ignore[union-attr]
