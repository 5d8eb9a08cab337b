"""The recipes of ``docs/job-schedulers.md`` run as they are: a scheduler's loop in bash, torchrun, a policy of pods.

The commands of a cluster are small scripts here: ``srun`` runs its arguments, ``scontrol`` notes them.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]
from transformers import HfArgumentParser

from hf_divguard import DivGuardTrainingArguments
from hf_divguard.errors import DIVERGED_EXIT_CODE, INTERRUPTED_EXIT_CODE
from hf_divguard.storage.events import read_events
from hf_divguard.storage.outcome_file import read_outcome
from tests.processes import ROOT, TORCHRUN, environment

PAGE = (ROOT / "docs" / "job-schedulers.md").read_text(encoding="utf-8")

TRAIN = """
import os, signal, sys
import torch
from transformers import HfArgumentParser, TrainerCallback
from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
from tests.hf.faults import NaNBatch
from tests.tiny import TokenRows, tiny_model

torch.set_num_threads(1)
small = (
    "--max_steps 14 --save_steps 2 --per_device_train_batch_size 2 --logging_steps 1 --report_to none --use_cpu "
    "--disable_tqdm true --dataloader_pin_memory false --divguard_check_steps 1 --divguard_skip_nonfinite false"
)
words = sys.argv[1:] + small.split()
if "rollback" in words:
    words += "--divguard_max_rollbacks 1 --divguard_cooldown_steps 2".split()
args = HfArgumentParser(DivGuardTrainingArguments).parse_args_into_dataclasses(words)[0]
model, scenario = tiny_model(), os.environ["SCENARIO"]
with open("lives", "a") as file:
    print(os.environ.get("RANK", "0"), file=file)


class TimeLimit(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5 and scenario == "limit":
            os.kill(os.getpid(), signal.SIGUSR1)


callbacks = [TimeLimit()] + ([NaNBatch(model, range(7, 100))] if scenario == "diverges" else [])
trainer = DivGuardTrainer(model=model, args=args, train_dataset=TokenRows(), callbacks=callbacks)
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Return a folder with ``train.py``, and ``bin`` with the commands of a cluster."""
    (tmp_path / "train.py").write_text(TRAIN)
    commands = {
        "srun": 'exec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol',
        "python": f'exec {sys.executable} -W ignore "$@"',
        "torchrun": f'exec {sys.executable} -W ignore {TORCHRUN} "$@"',
        "hf-divguard": f'exec {sys.executable} -m hf_divguard.cli "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, line in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def run(cluster: Path, script: str, scenario: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(cluster / "bin"), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-c", script],
        cwd=cluster,
        env=environment(SCENARIO=scenario, SLURM_JOB_ID="42", PATH=path),
        capture_output=True,
        text=True,
        timeout=600,
    )


def lives(cluster: Path) -> list[str]:
    return (cluster / "lives").read_text().split()


def requests(cluster: Path) -> list[str]:
    path = cluster / "scontrol"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_slurm_a_job_that_hits_its_limit_is_requeued_and_finishes(cluster: Path) -> None:
    [script] = [each for each in blocks("bash") if "#SBATCH" in each]
    first = run(cluster, script, "limit")
    assert first.returncode == INTERRUPTED_EXIT_CODE, first.stderr[-3000:]
    assert requests(cluster) == ["requeue 42"]
    end = read_outcome(cluster / "out")
    assert end is not None
    assert (end.status, end.step) == ("interrupted", 6)
    second = run(cluster, script, "limit")
    assert second.returncode == 0, second.stderr[-3000:]
    assert requests(cluster) == ["requeue 42"]
    end = read_outcome(cluster / "out")
    assert end is not None
    assert (end.status, end.step) == ("finished", 14)


@pytest.mark.slow
def test_slurm_a_job_that_diverges_is_not_requeued(cluster: Path) -> None:
    [script] = [each for each in blocks("bash") if "#SBATCH" in each]
    done = run(cluster, script, "diverges")
    assert done.returncode == DIVERGED_EXIT_CODE, done.stderr[-3000:]
    assert requests(cluster) == []
    assert done.stdout.count("out: diverged.") == 1


@pytest.mark.slow
def test_torchrun_the_folder_knows_what_its_exit_code_does_not(cluster: Path) -> None:
    script, elastic = [
        each.replace("--nproc_per_node 8", "--nproc_per_node 2")
        for each in blocks("bash")
        if each.startswith("torchrun")
    ]
    done = run(cluster, script + "exit $code\n", "diverges")
    assert done.returncode == DIVERGED_EXIT_CODE, done.stderr[-3000:]
    assert "exitcode  : 79" in done.stderr
    assert sorted(lives(cluster)) == ["0", "1"]
    assert [event["event"] for event in read_events(cluster / "out")] == ["stopped"]
    (cluster / "lives").unlink()
    done = run(cluster, elastic.replace("out ", "elastic "), "diverges")
    assert done.returncode == DIVERGED_EXIT_CODE, done.stderr[-3000:]
    assert sorted(lives(cluster)) == ["0", "1"]  # no restart


@pytest.mark.slow
def test_a_script_that_nobody_changed_is_interrupted_continued_and_stopped_with_the_same_codes(
    cluster: Path,
) -> None:
    text = re.sub(r" --divguard_\w+ \w+", "", TRAIN).replace("DivGuard", "")
    text = text.replace("from hf_divguard import", "from transformers import")
    (cluster / "train.py").write_text(text)
    [script] = [each for each in blocks("bash") if each.startswith("hf-divguard run")]
    quick = "--divguard_check_steps 1 --divguard_skip_nonfinite false --divguard_max_rollbacks 1 "
    script = script.replace("-- python", f"{quick} --divguard_cooldown_steps 2 -- python")
    for code, status, step in ((INTERRUPTED_EXIT_CODE, "interrupted", 6), (0, "finished", 14)):
        done = run(cluster, script, "limit")
        assert done.returncode == code, done.stderr[-3000:]
        end = read_outcome(cluster / "out")
        assert end is not None
        assert (end.status, end.step) == (status, step)
    done = run(cluster, script.replace("out ", "other "), "diverges")
    assert done.returncode == DIVERGED_EXIT_CODE, done.stderr[-3000:]


def test_kubernetes_the_policy_knows_the_codes_and_the_arguments_are_options() -> None:
    [text] = blocks("yaml")
    job = yaml.safe_load(text)
    rules = job["spec"]["podFailurePolicy"]["rules"]
    [container] = job["spec"]["template"]["spec"]["containers"]

    def action(code: int) -> str:
        for rule in rules:
            condition: dict[str, Any] = rule.get("onExitCodes", {})
            if code in condition.get("values", []) and condition["operator"] == "In":
                assert condition["containerName"] == container["name"]
                return str(rule["action"])
        return "Count"

    assert action(DIVERGED_EXIT_CODE) == "FailJob"
    assert action(INTERRUPTED_EXIT_CODE) == "Ignore"
    assert action(1) == action(137) == "Count"
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # the policy needs it
    [args] = HfArgumentParser(DivGuardTrainingArguments).parse_args_into_dataclasses(
        [*container["args"], "--use_cpu"]
    )
    assert (args.divguard_exit_code, args.divguard_save_on_signal) == (79, "SIGTERM")


def test_the_table_of_ends_names_the_words_of_the_outcome_file() -> None:
    from typing import get_args

    from hf_divguard.storage.outcome_file import Status

    named = set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    assert set(get_args(Status)) <= named
