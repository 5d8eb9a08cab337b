"""Every recipe runs with the command that stands at its top, and does what it says there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_divguard import best_checkpoints, find_checkpoints
from tests.processes import environment
from tests.tiny import checkpoint_steps

PROJECT = Path(__file__).parents[1]
EXAMPLES = PROJECT / "examples"
SHARED = {"recipe.py", "python_corpus.py"}
NEEDS = {
    "trl_sft.py": ("trl", "peft"),
    "trl_dpo.py": ("trl",),
    "trl_grpo.py": ("trl",),
    "embed_sentences.py": ("sentence_transformers",),
}


def recipes() -> list[str]:
    """Return the names of the recipes that are Python scripts with a command at the top."""
    names = [path.name for path in sorted(EXAMPLES.glob("*.py")) if path.name not in SHARED]
    return [name for name in names if name != "demo.py"]


def command_of(name: str) -> list[str]:
    """Return the words of the command at the top of a recipe."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    block = re.search(r"^    python (examples/.*?)\n\n", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None, f"{name} has no command at its top."
    return shlex.split(block[1].replace("\\\\\n", " "))


@dataclass
class Run:
    """What a recipe printed and left on disk."""

    printed: str
    folder: Path

    def lines(self, start: str) -> list[str]:
        """Return the rest of the printed lines that begin with ``start``."""
        return [line.removeprefix(start) for line in self.printed.splitlines() if line.startswith(start)]


def execute(command: list[str], folder: Path) -> Run:
    """Run a command in an empty folder; it writes into ``out``."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env=environment(PATH=path), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return Run(done.stdout, folder / "out")


def run_recipe(name: str, folder: Path) -> Run:
    """Run a recipe as its first lines say."""
    for module in NEEDS.get(name, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{name} needs {module}; `make test-recipes` runs it in an environment that has it")
    script, *flags = command_of(name)
    return execute([sys.executable, "-W", "ignore", str(PROJECT / script), *flags], folder)


def run_script(name: str, folder: Path) -> Run:
    """Run a shell script as its first lines say."""
    assert f"bash examples/{name} out" in (EXAMPLES / name).read_text(encoding="utf-8")
    return execute(["bash", str(EXAMPLES / name), "out"], folder)


def metrics(run: Run) -> dict[int, float]:
    """Return the ranking metric of each checkpoint that was printed as one of the best."""
    found = [re.match(r"out/checkpoint-(\d+)  \S+ (\S+)$", line) for line in run.lines("best: ")]
    return {int(each[1]): float(each[2]) for each in found if each is not None}


def test_every_recipe_is_in_the_list_and_has_a_test() -> None:
    """The page lists each script once, and each of them is run here."""
    listed = re.findall(r"^\| \[`(\S+)`\]\(\1\)", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE)
    scripts = [path.name for path in sorted(EXAMPLES.glob("*.sh"))]
    assert sorted(listed) == sorted([*recipes(), *scripts])
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in listed if f'"{name}", tmp_path' not in source] == []


@pytest.mark.slow
def test_the_best_three_checkpoints_and_the_last_one_stay(tmp_path: Path) -> None:
    run = run_recipe("preserve_best_checkpoints.py", tmp_path)
    best = metrics(run)
    assert len(best) == 3
    assert checkpoint_steps(run.folder) == {*best, 160}
    history = json.loads((run.folder / "checkpoint-160" / "trainer_state.json").read_text("utf-8"))[
        "log_history"
    ]
    evaluated = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert len(evaluated) == 8
    assert set(best) == set(sorted(evaluated, key=evaluated.__getitem__)[:3])


@pytest.mark.slow
def test_a_run_that_diverges_by_a_flag_is_rolled_back(tmp_path: Path) -> None:
    run = run_recipe("divergence_detection.py", tmp_path)
    step, target = map(int, re.findall(r"\d+", run.lines("rolled back: ")[0]))
    assert target < 60 <= step < 80
    assert run.lines("finished: ") == ["step 120"]


@pytest.mark.slow
def test_two_detectors_and_a_rule_of_your_own_find_the_same_fault(tmp_path: Path) -> None:
    run = run_recipe("advanced_detectors.py", tmp_path)
    assert int(run.lines("stopped after a finding: step ")[0]) < 60
    assert run.lines("AdaptiveDivergenceDetector (stop): ")
    assert run.lines("DualTimeScaleDivergenceDetector (warn): ")
    stopped = int(run.lines("tokens: ")[0].replace(",", ""))
    script, *flags = command_of("advanced_detectors.py")
    flags[flags.index("learning_rate", flags.index("--fault"))] = "none"
    resumed = execute(
        [sys.executable, "-W", "ignore", str(PROJECT / script), *flags, "--resume_from_checkpoint", "latest"],
        tmp_path,
    )
    assert int(resumed.lines("tokens: ")[0].replace(",", "")) == 60 * 8 * 32 > stopped


@pytest.mark.slow
def test_a_language_model_is_trained_by_flags(tmp_path: Path) -> None:
    run = run_recipe("train_lm.py", tmp_path)
    assert run.lines("finished: ") == ["step 60"]
    assert len(metrics(run)) == 2


@pytest.mark.slow
def test_the_best_three_by_f1_stay(tmp_path: Path) -> None:
    run = run_recipe("classify_csv.py", tmp_path)
    best = metrics(run)
    assert len(best) == 3
    assert checkpoint_steps(run.folder) == {*best, 200}
    assert all(each.metric_name == "eval_f1" for each in best_checkpoints(run.folder))
    assert max(best.values()) > 0.4, "The model must have learnt something: six labels give 0.17 by chance."


@pytest.mark.slow
def test_the_best_two_by_generation_stay(tmp_path: Path) -> None:
    run = run_recipe("seq2seq.py", tmp_path)
    assert len(metrics(run)) == 2
    assert max(metrics(run).values()) > 0.1


@pytest.mark.slow
def test_an_adapter_recovers_from_a_fault(tmp_path: Path) -> None:
    run = run_recipe("trl_sft.py", tmp_path)
    assert len(run.lines("rolled back: ")) == 1
    assert run.lines("finished: ") == ["step 80"]
    assert max(metrics(run).values()) < 4.2, "It must have learnt something after the fault."
    checkpoint = find_checkpoints(run.folder)[-1]
    assert (Path(checkpoint.path) / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_preferences_are_ranked_by_their_rewards(tmp_path: Path) -> None:
    run = run_recipe("trl_dpo.py", tmp_path)
    assert max(metrics(run).values()) > 0.9
    assert {each.metric_name for each in best_checkpoints(run.folder)} == {"eval_rewards/accuracies"}


@pytest.mark.slow
def test_a_nan_gradient_does_not_reach_the_weights_that_generate(tmp_path: Path) -> None:
    run = run_recipe("trl_grpo.py", tmp_path)
    assert run.lines("update skipped: ") == ["step 13"]
    assert run.lines("finished: ") == ["step 20"]


@pytest.mark.slow
def test_embeddings_keep_their_best_checkpoints(tmp_path: Path) -> None:
    run = run_recipe("embed_sentences.py", tmp_path)
    assert len(metrics(run)) == 2
    assert max(metrics(run).values()) < 3.0


@pytest.mark.slow
def test_two_processes_roll_back_together(tmp_path: Path) -> None:
    run = run_script("two_processes.sh", tmp_path)
    ((step, target),) = [tuple(map(int, re.findall(r"\d+", line))) for line in run.lines("rolled back: ")]
    # Losses are seen every ten steps here, and a state from shortly before the fault is still kept then.
    assert 10 <= target < 30 < step <= 42
    assert run.lines("finished: ") == ["step 60"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformers.distributed") is None, reason="this needs Transformers 5"
)
def test_two_processes_put_back_their_shards_together(tmp_path: Path) -> None:
    run = run_script("sharded_fsdp2.sh", tmp_path)
    ((_, target),) = [tuple(map(int, re.findall(r"\d+", line))) for line in run.lines("rolled back: ")]
    assert 10 <= target < 30
    assert run.lines("finished: ") == ["step 60"]
    kept = {checkpoint.step: checkpoint for checkpoint in find_checkpoints(run.folder)}
    assert kept[60].verdict.resumable
    assert (Path(kept[60].path) / "distributed_optimizer").is_dir()


@pytest.mark.slow
def test_a_run_that_is_interrupted_twice_finishes(tmp_path: Path) -> None:
    run = run_script("restart_loop.sh", tmp_path)
    codes = [int(line.split()[-1]) for line in run.lines("job ")]
    assert codes == [75, 75, 0]
    assert run.lines("finished: ") == ["step 600"]
