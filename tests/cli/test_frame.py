"""The command as such: what starting it costs, help, errors, exit codes, JSON, pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.cli.output import table
from hf_divguard.cli.parsers import COMMANDS
from tests.processes import environment

HEAVY = ("torch", "transformers", "numpy", "accelerate", "typer", "rich", "yaml")
READING = ("status", "list", "best", "latest", "verify", "replay", "prune", "compare", "watch")


def heavy_modules_after(*words: str, first: str = "") -> list[str]:
    """Run a command in a fresh interpreter; return which heavy packages it loaded."""
    code = (
        f"import sys\n{first}\nfrom hf_divguard.cli.main import main\n"
        f"try:\n    main({list(words)!r})\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("LOADED")[2].split()


def test_the_help_loads_nothing_heavy() -> None:
    assert heavy_modules_after("--help") == []


def test_reading_a_run_loads_neither_torch_nor_transformers(made: Path) -> None:
    for words in (("status",), ("list", "--json"), ("best",), ("replay", "--plot"), ("prune",)):
        assert heavy_modules_after(words[0], str(made / "stopped"), *words[1:]) == [], words


def test_a_heavy_import_would_be_noticed() -> None:
    """The two tests above can fail."""
    assert "numpy" in heavy_modules_after("--help", first="import numpy")


@pytest.mark.slow
def test_the_help_comes_within_300_milliseconds() -> None:
    """The fastest of several starts: a machine that is busy with other work says nothing."""
    times = []
    for _ in range(7):
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "hf_divguard.cli", "--help"],
            env=environment(),
            capture_output=True,
            check=True,
        )
        times.append(time.perf_counter() - began)
    assert min(times) < 0.3


def test_every_command_is_listed_with_exit_codes(cli: Any) -> None:
    listed = cli("--help")
    assert listed.code == 0
    for name in COMMANDS:
        assert f"    {name}" in listed.out
        answer = cli(name, "--help")
        assert answer.code == 0
        assert "exit codes:\n  0 " in answer.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "A command is needed: status, list"),
        (("stat",), "invalid choice: 'stat'"),
        (("status",), "required: DIR. See `hf-divguard status --help`"),
        (("status", "a", "b"), "Unrecognized arguments: b"),
        (("list", ".", "--keep-last", "two"), "invalid int value: 'two'"),
        (("replay", "x", "--detector", "emma"), "invalid choice: 'emma'"),
        (("best", ".", "--greater-is-better", "--lower-is-better"), "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(
    cli: Any, words: tuple[str, ...], says: str
) -> None:
    answer = cli(*words)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.count("\n") == 1
    assert says in answer.err


@pytest.mark.parametrize("command", READING)
def test_a_missing_path_is_a_sentence_with_the_way_out(cli: Any, tmp_path: Path, command: str) -> None:
    (tmp_path / "run-1").mkdir()
    answer = cli(command, tmp_path / "run_1")
    assert (answer.code, answer.out, answer.err.count("\n")) == (3, "", 1)
    assert "There is no" in answer.err
    assert f"`{tmp_path / 'run_1'}`" in answer.err
    assert f"There is `{tmp_path / 'run-1'}`." in answer.err


@pytest.mark.parametrize("command", ["status", "list", "best", "latest", "verify", "prune"])
def test_a_folder_that_is_no_run_is_a_sentence_not_an_empty_list(
    cli: Any, made: Path, tmp_path: Path, command: str
) -> None:
    answer = cli(command, tmp_path)
    assert (answer.code, answer.out) == (3, "")
    assert "is not the output folder of a run" in answer.err
    answer = cli(command, made)
    assert answer.code == 3
    assert f"Below it are runs: `{made / 'given_up'}`" in answer.err


@pytest.mark.parametrize("command", ["status", "list", "best", "latest", "prune"])
def test_a_checkpoint_in_place_of_its_folder_is_a_sentence(cli: Any, made: Path, command: str) -> None:
    answer = cli(command, made / "stock" / "checkpoint-4")
    assert answer.code == 3
    assert f"Give the output folder that holds it: `{made / 'stock'}`" in answer.err


@pytest.mark.parametrize("command", ["status", "list", "best", "latest", "verify", "prune"])
def test_a_file_in_place_of_a_folder_is_a_sentence(cli: Any, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("{}")
    answer = cli(command, tmp_path / "file")
    assert (answer.code, answer.err.count("\n")) == (3, 1)
    assert "is a file" in answer.err


@pytest.mark.parametrize("command", READING)
def test_an_error_with_json_is_a_json_object(cli: Any, tmp_path: Path, command: str) -> None:
    answer = cli(command, tmp_path / "none", "--json")
    assert (answer.code, answer.err) == (3, "")
    assert answer.json["schema"] == 1
    assert answer.json["command"] == command
    assert answer.json["exit_code"] == 3
    assert answer.json["error"].startswith("There is no")


@pytest.mark.parametrize("command", READING)
def test_json_is_one_strict_object_with_its_version(cli: Any, made: Path, command: str) -> None:
    """The run has NaN losses and metrics."""
    content = cli(command, made / "stopped", "--json").json
    assert content["schema"] == 1
    assert content["command"] == command


def test_there_is_no_colour_in_a_pipe(cli: Any, made: Path) -> None:
    for command in READING:
        assert "\x1b" not in cli(command, made / "stopped").out


@pytest.mark.parametrize(
    ("variable", "has_colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_gets_colours_unless_no_color_is_set(
    made: Path, variable: dict[str, str], has_colour: bool
) -> None:
    """The command runs on a real pseudo-terminal."""
    leader, follower = os.openpty()
    clean = {name: value for name, value in environment().items() if name != "NO_COLOR"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_divguard.cli", "status", str(made / "stock")],
        env={**clean, "TERM": "xterm", **variable},
        stdout=follower,
        timeout=60,
    )
    os.close(follower)
    assert done.returncode == 0
    assert (b"\x1b[32mfinished" in os.read(leader, 65536)) == has_colour
    os.close(leader)


def test_a_reader_that_goes_away_causes_no_error(made: Path) -> None:
    """``hf-divguard list DIR | head -1``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_divguard.cli", "list", str(made / "stock")],
        env={**environment(), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, error = process.communicate(timeout=60)
    assert error == b""
    assert process.returncode == 128 + 13


def test_text_of_others_cannot_act_on_a_terminal(cli: Any, tmp_path: Path) -> None:
    folder = tmp_path / "red\x1b[31m\nrun"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(
        json.dumps(
            {"global_step": 1, "max_steps": 1, "log_history": [{"\x1b[2J": 1, "loss": 2.0, "step": 1}]}
        )
    )
    for words in (
        ("status", folder),
        ("list", folder),
        ("replay", folder),
        ("best", folder),
        ("status", folder / "x"),
    ):
        answer = cli(*words)
        assert "\x1b" not in answer.out + answer.err


def test_a_name_that_is_not_utf8_is_shown(cli: Any, made: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/run\xff")
    os.symlink(made / "stock", odd)
    assert cli("status", odd).code == 0
    assert cli("status", odd, "--json").json["dir"] == odd
    done = subprocess.run(
        [sys.executable, "-m", "hf_divguard.cli", "latest", odd], env=environment(), capture_output=True
    )
    assert done.stdout.strip() == os.fsencode(odd) + b"/checkpoint-24"


def test_a_table_aligns_its_columns() -> None:
    assert table(["step", "name"], [[1, "a"], [1000, "b\x07"]], right="step") == (
        "step  name\n   1  a\n1000  b\\x07"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_a_completion_script(cli: Any, shell: str) -> None:
    answer = cli("completion", shell)
    assert answer.code == 0
    for word in (*COMMANDS, "keep-last", "fail-on-finding"):
        assert word in answer.out


def test_bash_completes_commands_and_options(cli: Any, tmp_path: Path) -> None:
    """Bash itself runs the script."""
    script = tmp_path / "complete.bash"
    script.write_text(cli("completion", "bash").out)
    for words, expected in (
        (["hf-divguard", "st"], "status"),
        (["hf-divguard", "prune", "--ke"], "--keep-last"),
    ):
        given = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
        ask = f"source {script}; {given}; _hf_divguard; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=30)
        assert expected in done.stdout.split()


def test_the_command_is_an_entry_point_of_the_package() -> None:
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert "hf-divguard = hf_divguard.cli.main:main" in setup
