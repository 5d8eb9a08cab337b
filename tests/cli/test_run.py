"""``run``: scripts that nobody changed, guarded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hf_divguard import DivGuardArgumentsMixin, find_checkpoints
from hf_divguard.cli.exits import CommandError
from hf_divguard.cli.run_options import known_options, options_from_file, options_from_words
from hf_divguard.storage.events import read_events
from tests.processes import TORCHRUN, environment
from tests.tiny import same_weights

GUARDED = (sys.executable, "-m", "hf_divguard.cli", "run")
SCRIPT = ("-W", "ignore", "-m", "tests.cli.scripts.train")
QUICK = ("--divguard_action", "rollback", "--divguard_check_steps", "1", "--divguard_cooldown_steps", "2")
NEVER = 10**6


def call(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(
    *words: object, options: tuple[str, ...] = QUICK, **variables: str
) -> subprocess.CompletedProcess[str]:
    return call(*GUARDED, *options, "--", *words, **variables)


def train(kind: str, folder: Path, fault: int = NEVER, *, launcher: str = "", options: Any = QUICK) -> Any:
    done = run(
        sys.executable,
        *launcher.split(),
        *SCRIPT[2 if launcher else 0 :],
        kind,
        folder,
        fault,
        options=options,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing was guarded" not in done.stderr
    return done


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return the log of a run without what is measured by the clock."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    clocked = ("_runtime", "_per_second")
    return [{key: value for key, value in entry.items() if not key.endswith(clocked)} for entry in log]


# ---- training


@pytest.mark.parametrize("kind", ["own", pytest.param("plain", marks=pytest.mark.slow), "seq2seq"])
def test_a_healthy_run_is_the_one_without_guards_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    alone = call(sys.executable, *SCRIPT, kind, tmp_path / "alone", NEVER)
    assert alone.returncode == 0, alone.stderr[-3000:]
    guarded = train(kind, tmp_path / "guarded")
    first, second = (
        load_file(tmp_path / name / "checkpoint-24" / "model.safetensors") for name in ("alone", "guarded")
    )
    assert same_weights(first, second)
    assert log_of(tmp_path / "alone") == log_of(tmp_path / "guarded")
    assert alone.stdout.splitlines()[-1] == guarded.stdout.splitlines()[-1]
    assert all(each.verdict.has_manifest for each in find_checkpoints(tmp_path / "guarded"))


LAUNCHERS = [
    pytest.param(f"{TORCHRUN} --nproc_per_node=2", id="torchrun"),
    pytest.param("-m accelerate.commands.launch --cpu", id="accelerate launch"),
]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_healthy_run_under_a_launcher_is_the_one_without_guards_to_the_last_bit(
    tmp_path: Path, launcher: str
) -> None:
    words = (sys.executable, *launcher.split(), *SCRIPT[2:], "plain", tmp_path / "alone", NEVER)
    alone = call(*words)
    assert alone.returncode == 0, alone.stderr[-3000:]
    train("plain", tmp_path / "guarded", launcher=launcher)
    first, second = (
        load_file(tmp_path / name / "checkpoint-24" / "model.safetensors") for name in ("alone", "guarded")
    )
    assert same_weights(first, second)
    assert log_of(tmp_path / "alone") == log_of(tmp_path / "guarded")
    assert read_events(tmp_path / "guarded") == []


@pytest.mark.parametrize("kind", ["own", pytest.param("plain", marks=pytest.mark.slow), "seq2seq"])
def test_a_fault_is_rolled_back(tmp_path: Path, kind: str) -> None:
    train(kind, tmp_path, fault=14)
    [event] = [each for each in read_events(tmp_path) if each["event"] == "rollback"]
    assert (event["onset_step"], event["target_step"]) == (14, 12)
    weights = load_file(tmp_path / "checkpoint-24" / "model.safetensors")
    assert all(bool(each.isfinite().all()) for each in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_fault_under_a_launcher_is_rolled_back(tmp_path: Path, launcher: str) -> None:
    train("plain", tmp_path, fault=14, launcher=launcher)
    [event] = [each for each in read_events(tmp_path) if each["event"] == "rollback"]
    assert event["target_step"] == 12
    assert find_checkpoints(tmp_path)[-1].step == 24


def test_the_options_are_in_the_record_and_the_arguments_stay_loadable(tmp_path: Path) -> None:
    """A process without hf_divguard loads ``training_args.bin``."""
    train("plain", tmp_path, options=("--divguard_action", "stop", "--eval_on_save"))
    code = (
        "import sys, torch; sys.modules['hf_divguard'] = None\n"
        f"args = torch.load({str(tmp_path / 'checkpoint-24' / 'training_args.bin')!r}, weights_only=False)\n"
        "print(type(args).__name__, args.divguard_detector, args.divguard_action, args.eval_on_save, args.max_steps)"
    )
    assert call(sys.executable, "-W", "ignore", "-c", code).stdout.split() == [
        "TrainingArguments", "adaptive", "stop", "True", "24",
    ]  # fmt: skip


# ---- exit codes, output, signals


@pytest.mark.parametrize("code", [0, 1, 7, 79])
def test_the_exit_code_is_that_of_the_command(code: int) -> None:
    assert run(sys.executable, "-c", f"raise SystemExit({code})").returncode == code


def test_output_and_traceback_are_those_of_the_command() -> None:
    words = (sys.executable, "-c", "print('out'); raise ValueError('of the script')")
    alone, guarded = call(*words), run(*words)
    assert guarded.returncode == alone.returncode == 1
    assert guarded.stdout == alone.stdout
    assert guarded.stderr.startswith(alone.stderr)
    assert guarded.stderr.count("\n") == alone.stderr.count("\n") + 1


def test_a_command_that_a_signal_ends_gives_the_code_of_a_shell() -> None:
    assert run(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)").returncode == 128 + 9


def test_signals_reach_the_command(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [*GUARDED, "--", sys.executable, "-c", code], env=environment(), stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 5


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--", "no-such-command-here"), 127, "There is no command `no-such-command-here`."),
        (("--", os.devnull), 126, "cannot be run"),
        ((), 2, "A command is needed"),
        (("--",), 2, "A command is needed"),
        (("python", "train.py"), 2, "Put `--` before the command"),
        (("--divguard_detectr", "ema", "--", "true"), 2, "Did you mean `--divguard_detector`?"),
        (("--divguard_detector", "emma", "--", "true"), 2, "There is no detector 'emma'"),
        (("--divguard_action", "panic", "--", "true"), 2, "`--divguard_action` must be one of"),
        (("--divguard_check_steps", "few", "--", "true"), 2, "must be a whole number, got 'few'"),
        (("--divguard_action", "--", "true"), 2, "`--divguard_action` needs a value"),
        (("--divguard_detector_kwargs", '{"zork": 1}', "--", "true"), 2, "has no parameter 'zork'"),
        (("--options", "none.yaml", "--", "true"), 3, "`none.yaml` cannot be read"),
    ],
)
def test_a_wrong_command_line_ends_before_the_command_starts(
    cli: Any, words: tuple[str, ...], code: int, says: str
) -> None:
    answer = cli("run", *words)
    assert answer.code == code
    assert says in answer.err
    assert answer.err.count("\n") == 1


# ---- nothing was guarded

OWN = """
from hf_divguard import DivGuardTrainer
"""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("true",), "no Python process took part"),
        ((sys.executable, "-I", "-c", "pass"), "no Python process took part"),
        ((sys.executable, "-c", "import json"), "the Trainer of Transformers was not imported"),
        ((sys.executable, "-W", "ignore", "-c", "import transformers.trainer"), "no trainer was made"),
        ((sys.executable, "-W", "ignore", "-c", OWN), "the script uses hf_divguard itself"),
    ],
    ids=["no Python", "isolated", "no Trainer", "none made", "guards itself"],
)
def test_it_says_when_nothing_was_guarded(words: tuple[str, ...], says: str) -> None:
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "hf-divguard run: nothing was guarded:" in done.stderr
    assert says in done.stderr


def test_the_sitecustomize_of_the_user_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.MARK = __file__\n")
    code = "import sys; print(MARK, sys.modules['sitecustomize'].__file__, any('hook' in each for each in sys.path))"
    before = environment()["PYTHONPATH"]
    done = run(sys.executable, "-c", code, PYTHONPATH=os.pathsep.join([str(tmp_path), before]))
    path = str(tmp_path / "sitecustomize.py")
    assert done.stdout.split() == [path, path, "False"]


def test_a_python_process_costs_next_to_nothing_more() -> None:
    code = "import sys; print(len(sys.modules))"
    alone, guarded = (
        int(each.stdout) for each in (call(sys.executable, "-c", code), run(sys.executable, "-c", code))
    )
    assert guarded - alone < 15


# ---- options


def test_the_options_are_the_fields_of_the_arguments() -> None:
    assert list(known_options()) == [each.name for each in fields(DivGuardArgumentsMixin)]


def test_options_are_read_as_their_types() -> None:
    words = "--eval_on_save --preserve_n_best=3 --divguard_rollback_lr_factor 0.5 --preserve-best-model false"
    kwargs = '--divguard_detector_kwargs={"threshold": 1.5}'
    assert options_from_words([*words.split(), kwargs]) == {
        "eval_on_save": True,
        "preserve_n_best": 3,
        "divguard_rollback_lr_factor": 0.5,
        "preserve_best_model": False,
        "divguard_detector_kwargs": {"threshold": 1.5},
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "o.yaml",
            "divguard_detector: ema\ndivguard_detector_kwargs: {threshold: 1.5}\neval_on_save: true\n",
        ),
        (
            "o.json",
            '{"divguard_detector": "ema", "divguard_detector_kwargs": {"threshold": 1.5}, "eval_on_save": true}',
        ),
    ],
)
def test_options_may_come_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert options_from_file(str(tmp_path / name)) == {
        "divguard_detector": "ema",
        "divguard_detector_kwargs": {"threshold": 1.5},
        "eval_on_save": True,
    }


@pytest.mark.parametrize("text", ["", "a: [", "- a\n- b\n", "zork: 1", "preserve_n_best: true", "\x00"])
def test_a_file_that_holds_no_options_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "o.yaml").write_text(text)
    with pytest.raises(CommandError):
        options_from_file(str(tmp_path / "o.yaml"))
