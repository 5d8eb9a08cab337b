"""The exit codes of ``hf-divguard``, and the error that ends a command."""

from __future__ import annotations

from hf_divguard.errors import DIVERGED_EXIT_CODE

__all__ = [
    "CANNOT_ANSWER",
    "DIVERGED",
    "FAILED",
    "NO",
    "OK",
    "STATUS_HELP",
    "STOPPED",
    "USAGE",
    "CommandError",
    "exit_help",
]

OK = 0
"""The question was answered."""

NO = 1
"""The answer is no: no such checkpoint, not complete, a finding with ``--fail-on-finding``."""

USAGE = 2
"""The command line is wrong."""

CANNOT_ANSWER = 3
"""A path is missing, is no run, or cannot be read."""

FAILED = 70
"""``status --exit-code``: the run ended with an error (``EX_SOFTWARE`` of sysexits.h)."""

STOPPED = 75
"""``status --exit-code``: the run stopped before its end and can be resumed (``EX_TEMPFAIL``)."""

DIVERGED = DIVERGED_EXIT_CODE
"""``status --exit-code``: the run diverged."""

_COMMON = {
    OK: "done",
    USAGE: "the command line is wrong",
    CANNOT_ANSWER: "a path is missing, is no run, or cannot be read",
}
STATUS_HELP = {
    OK: "done; with --exit-code: the run is finished or running",
    FAILED: "with --exit-code: the run ended with an error",
    STOPPED: "with --exit-code: the run stopped before its end and can be resumed",
    DIVERGED: "with --exit-code: the run diverged",
}
"""What the exit codes of ``status`` mean."""


class CommandError(Exception):
    """Ends a command with one sentence for the user.

    Args:
        message: What must hold, what was found, what to do.
        code: The exit code.
    """

    def __init__(self, message: str, code: int = CANNOT_ANSWER) -> None:
        super().__init__(message)
        self.code = code


def exit_help(special: dict[int, str] | None = None) -> str:
    """Return the part of a help text that lists the exit codes.

    Example:
        >>> print(exit_help({1: "there is none"}))
        exit codes:
          0    done
          1    there is none
          2    the command line is wrong
          3    a path is missing, is no run, or cannot be read
    """
    codes = sorted((_COMMON | (special or {})).items())
    return "\n".join(["exit codes:", *(f"  {code:<4} {meaning}" for code, meaning in codes)])
