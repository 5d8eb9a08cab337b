"""The examples run, and print what their documentation says."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.processes import run_python
from tests.tiny import checkpoint_steps

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in its own process."""
    done = run_python("-W", "ignore", EXAMPLES / name, *flags, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


SMALL = shlex.split("--text_limit 60000 --vocabulary 300 --block 16 --eval_blocks 8 --hidden 32 --layers 1")


def test_the_script_trains_with_flags_alone(tmp_path: Path) -> None:
    """Evaluation on save, best checkpoints and a detector without a line of code; then a resume."""
    flags = [
        *SMALL,
        *shlex.split(
            "--output_dir out --max_steps 6 --save_steps 2 --save_total_limit 1 --logging_steps 2 --seed 3"
        ),
        *shlex.split(
            "--eval_on_save --preserve_best_model --preserve_n_best 2 --best_model_greater_is_better false"
        ),
        *shlex.split("--divguard_detector adaptive --divguard_action stop"),
        *shlex.split("--use_cpu --report_to none --disable_tqdm true --dataloader_pin_memory false"),
    ]
    first = run_example("train_lm.py", *flags, cwd=tmp_path)
    assert len([line for line in first.stdout.splitlines() if line.startswith("best: ")]) == 2
    kept = checkpoint_steps(tmp_path / "out")
    assert 6 in kept
    assert len(kept) <= 3
    flags[flags.index("--max_steps") + 1] = "8"
    second = run_example("train_lm.py", *flags, "--resume_from_checkpoint", "latest", cwd=tmp_path)
    assert "best: " in second.stdout
    assert 8 in checkpoint_steps(tmp_path / "out")


def test_help_lists_our_options(tmp_path: Path) -> None:
    """``--help`` lists the flags of the package and those of ``TrainingArguments``."""
    shown = run_example("train_lm.py", "--help", cwd=tmp_path).stdout
    for flag in (
        "--text_folder",
        "--learning_rate",
        "--preserve_n_best",
        "--eval_on_save",
        "--divguard_detector",
    ):
        assert flag in shown


@pytest.mark.slow
def test_the_demo_ends_with_its_table_and_its_picture(tmp_path: Path) -> None:
    """The complete demo: the result of each trainer, and all curves in one picture."""
    printed = run_example("demo.py", cwd=tmp_path).stdout
    assert "did not notice the fault," in printed
    assert "trained to step 400" in printed
    assert "rolled back (step" in printed
    assert "x the healthy run's" in printed
    assert "checkpoints on disk" in printed
    assert (tmp_path / "demo_output" / "demo.png").read_bytes().startswith(b"\x89PNG")
