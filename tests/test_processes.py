"""The helpers that run code in other processes do what the tests of crashes rely on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_divguard.storage.failpoints import failpoint
from tests.processes import fork, free_port, kill_at, run_python, wait_for


def pass_failpoints(log: Path, arm: Callable[[], object]) -> tuple[int, list[str]]:
    """Pass four failpoints in a fork; return its exit code, and the failpoints that it got past."""

    def work() -> None:
        with arm():
            for name in ("saved", "decided", "saved", "saved"):
                failpoint(name)
                print(name, flush=True)

    return wait_for(fork(work, log)), log.read_text().split()


@pytest.mark.parametrize(
    ("arm", "passed"),
    [
        (lambda: kill_at("saved"), []),
        (lambda: kill_at("decided"), ["saved"]),
        (lambda: kill_at("saved", after="decided"), ["saved", "decided"]),
        (lambda: kill_at("saved", count=2), ["saved", "decided"]),
        (lambda: kill_at("saved", after="saved"), ["saved", "decided"]),
        (lambda: kill_at("saved", after="decided", count=2), ["saved", "decided", "saved"]),
    ],
    ids=["first", "another", "after", "count", "after itself", "after and count"],
)
def test_a_process_is_killed_at_the_failpoint_that_was_named(
    arm: Callable[[], object], passed: list[str], tmp_path: Path
) -> None:
    assert pass_failpoints(tmp_path / "log", arm) == (-signal.SIGKILL, passed)


@pytest.mark.parametrize("moment", [None, "never"])
def test_without_its_failpoint_a_process_lives(moment: str | None, tmp_path: Path) -> None:
    code, passed = pass_failpoints(tmp_path / "log", lambda: kill_at(moment))
    assert (code, len(passed)) == (0, 4)


def test_an_error_in_a_fork_is_its_exit_code_and_in_its_log(tmp_path: Path) -> None:
    def work() -> None:
        raise ValueError("an error of the test")

    assert wait_for(fork(work, tmp_path / "log")) == 1
    assert "ValueError: an error of the test" in (tmp_path / "log").read_text()


def test_a_fresh_process_can_import_the_package_and_its_tests(tmp_path: Path) -> None:
    done = run_python("-c", "import sys, hf_divguard, tests; print(sys.executable)", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable), done.stderr


def test_ports_differ() -> None:
    assert len({free_port() for _ in range(20)}) > 10
