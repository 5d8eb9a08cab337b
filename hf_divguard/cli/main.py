"""The entry point of ``hf-divguard``: reads the command line, starts a command, turns errors into sentences."""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from hf_divguard._version import __version__
from hf_divguard.cli.exits import CANNOT_ANSWER, FAILED, USAGE, CommandError, exit_help
from hf_divguard.cli.output import print_json, printable
from hf_divguard.cli.parsers import COMMANDS, add_commands

__all__ = ["main", "make_parser"]

_DESCRIPTION = "Answers questions about a training run from its files: needs no GPU, no torch, no network."


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence each."""

    def error(self, message: str) -> NoReturn:
        # argparse writes the name of the program itself; here the caller does.
        raise CommandError(f"{message[:1].upper()}{message[1:]}. See `{self.prog} --help`.", USAGE)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="hf-divguard",
        description=_DESCRIPTION,
        epilog=exit_help({1: "the answer is no: nothing found, not complete, a finding"}),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf-divguard {__version__}")
    add_commands(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    Args:
        arguments: The words of the command line; ``None`` for those of this process.
    """
    if arguments is None:
        gc.disable()  # the process ends soon, and long logs are many objects without a cycle
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, after = words, []
    if words[:1] == ["run"] and "--" in words:
        own, after = words[: words.index("--")], words[words.index("--") + 1 :]
    command = next((word for word in own if word in COMMANDS), "")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # What the package would log are notes beside the answer; the answer has them where they matter.
    logging.getLogger("hf_divguard").addHandler(logging.NullHandler())
    try:
        parser = make_parser()
        options, rest = parser.parse_known_args(own)
        if options.command == "run":
            options.words, options.after = rest, after
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        code = _run(options)
        sys.stdout.flush()
        return code
    except CommandError as error:
        return _fail(command, str(error), error.code, as_json="--json" in own)
    except BrokenPipeError:
        # The reader, `head` perhaps, has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except KeyboardInterrupt:
        return 128 + 2


def _run(options: Any) -> int:
    if options.command is None:
        raise CommandError(
            f"A command is needed: {', '.join(COMMANDS)}. See `hf-divguard --help`.",
            USAGE,
        )
    module = importlib.import_module(f"hf_divguard.cli.{COMMANDS[options.command]}")
    try:
        return int(getattr(module, f"run_{options.command}")(options))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        where = getattr(error, "filename", None)
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CommandError(f"{f'{where}: ' if where else ''}{words}", CANNOT_ANSWER) from error
    except CommandError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise CommandError(
            f"This is a fault of hf-divguard, please report it: {type(error).__name__}: {error} "
            f"({os.path.basename(place.filename)}, line {place.lineno}).",
            FAILED,
        ) from error


def _fail(command: str, message: str, code: int, *, as_json: bool) -> int:
    if as_json:
        print_json(command, {"error": message, "exit_code": code})
    else:
        print(f"hf-divguard: {printable(message)}", file=sys.stderr)
    return code
