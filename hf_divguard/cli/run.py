"""The command ``run``: runs a training script with its ``Trainer`` guarded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from hf_divguard.cli import hook
from hf_divguard.cli.exits import USAGE, CommandError
from hf_divguard.cli.run_options import check_detector, options_from_file, options_from_words

__all__ = ["run_run"]

_SETTINGS, _NOTES = "HF_DIVGUARD_RUN", "HF_DIVGUARD_RUN_NOTES"
_FORWARDED = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCONT")
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126


def run_run(options: Any) -> int:
    """Run the command after ``--``; return its exit code."""
    chosen = options_from_file(options.options) if options.options else {}
    chosen |= options_from_words(options.words)
    chosen.setdefault("divguard_detector", "adaptive")
    check_detector(chosen)
    if not options.after:
        raise CommandError("A command is needed: hf-divguard run [OPTION ...] -- python train.py", USAGE)
    with tempfile.TemporaryDirectory(prefix="hf-divguard-run-", ignore_cleanup_errors=True) as notes:
        environment = {
            **os.environ,
            _SETTINGS: json.dumps({"options": chosen}),
            _NOTES: notes,
            "PYTHONPATH": os.pathsep.join(
                filter(None, [os.path.dirname(hook.__file__), os.environ.get("PYTHONPATH")])
            ),
        }
        code = _run(options.after, environment)
        reason = _not_guarded(os.listdir(notes))
    if reason is not None:
        print(f"hf-divguard run: nothing was guarded: {reason}", file=sys.stderr)
    return code


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run ``command`` and pass signals on to it; return its exit code, 128 and the number for a signal."""
    try:
        process = subprocess.Popen(command, env=environment)
    except FileNotFoundError:
        raise CommandError(f"There is no command `{command[0]}`.", _NOT_FOUND) from None
    except OSError as error:
        raise CommandError(f"`{command[0]}` cannot be run: {error.strerror}.", _NOT_EXECUTABLE) from None
    # Ctrl-C in a terminal goes to all processes in front of it, the command among them.
    signals = [*_FORWARDED] if sys.stdin is not None and sys.stdin.isatty() else [*_FORWARDED, "SIGINT"]
    if "SIGINT" not in signals:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in signals:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: process.send_signal(number))
    code = process.wait()
    return code if code >= 0 else 128 - code


def _not_guarded(notes: Sequence[str]) -> str | None:
    """Return why no trainer was guarded, from the notes of the processes; ``None`` if one was."""
    kinds = {name.partition("-")[0] for name in notes}
    if "made" in kinds:
        return None
    if "own" in kinds:
        return (
            "the script uses hf_divguard itself, and its own options hold. Run it without `hf-divguard run`."
        )
    if "trainer" in kinds:
        return "the Trainer of Transformers was imported, but no trainer was made."
    if "python" in kinds:
        return "the Trainer of Transformers was not imported. Only scripts that train with it can be guarded."
    return (
        "no Python process took part that reads PYTHONPATH. Python must not be started with -I, -E or -S, nor in a "
        "container or on another machine that has other variables."
    )
