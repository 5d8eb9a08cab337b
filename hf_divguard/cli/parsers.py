"""The commands of ``hf-divguard`` with their options and help texts. Imports nothing that takes time."""

from __future__ import annotations

import argparse
from typing import Any

from hf_divguard.cli.exits import STATUS_HELP, exit_help

__all__ = ["COMMANDS", "DEFAULT_KEEP_BEST", "DEFAULT_KEEP_LAST", "add_commands"]

COMMANDS = {
    "status": "status",
    "list": "checkpoints",
    "best": "checkpoints",
    "latest": "checkpoints",
    "verify": "checkpoints",
    "replay": "replay",
    "tune": "tune",
    "compare": "compare",
    "report": "report",
    "watch": "watch",
    "prune": "prune",
    "run": "run",
    "skill": "skill",
    "completion": "completion",
}
"""The commands, and the module of this package that holds each."""

DEFAULT_KEEP_LAST = 2
DEFAULT_KEEP_BEST = 1

_DETECTORS = ("adaptive", "ema", "window", "nonfinite")


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add all commands to ``parser``."""
    group = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_status(group)
    _add_checkpoints(group)
    _add_replay(group)
    _add_tune(group)
    _add_compare(group)
    _add_report(group)
    _add_watch(group)
    _add_prune(group)
    _add_run(group)
    _command(
        group,
        "skill",
        "Print a skill file for coding agents: how to read a run and what to do about each outcome.",
        {},
    )
    shell = _command(group, "completion", "Print the completion script of a shell.", {})
    shell.add_argument("shell", choices=("bash", "zsh", "fish"))


def _command(
    group: Any, name: str, text: str, exits: dict[int, str], *, more: str = "", has_json: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = group.add_parser(
        name,
        help=text,
        description=text + (f"\n\n{more}" if more else ""),
        epilog=exit_help(exits),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if has_json:
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object (docs/command-line.md)"
        )
    return parser


def _add_status(group: Any) -> None:
    parser = _command(
        group,
        "status",
        "Say how a run ended, or that it is running, and which checkpoint to take.",
        STATUS_HELP,
        more="Works for output folders of the stock Trainer too; findings then come from a replay of its log.",
    )
    parser.add_argument("dir", metavar="DIR", help="output folder of a run")
    parser.add_argument("--exit-code", action="store_true", help="let the exit code say how the run ended")
    _add_metric(parser)


def _add_metric(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="metric that ranks, with or without eval_ (default: that of the run, else loss)",
    )
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument(
        "--greater-is-better", dest="greater", action="store_true", default=None, help="its direction"
    )
    direction.add_argument(
        "--lower-is-better", dest="greater", action="store_false", default=None, help="its direction"
    )


def _add_keep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-last",
        type=int,
        default=DEFAULT_KEEP_LAST,
        metavar="K",
        help="keep the last K (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-best",
        type=int,
        default=DEFAULT_KEEP_BEST,
        metavar="N",
        help="keep the best N (default: %(default)s)",
    )
    parser.add_argument("--every", type=int, metavar="M", help="also keep those of every M-th step")


def _add_checkpoints(group: Any) -> None:
    listing = _command(group, "list", "List the checkpoints of a run in the order of saving.", {})
    listing.add_argument("dir", metavar="DIR", help="output folder of a run")
    _add_keep(listing)
    _add_metric(listing)
    best = _command(
        group, "best", "Print the path of the best complete checkpoint.", {1: "no checkpoint can be ranked"}
    )
    best.add_argument("dir", metavar="DIR", help="output folder of a run")
    best.add_argument("-n", type=int, default=1, metavar="N", help="print the best N, one a line")
    _add_metric(best)
    latest = _command(
        group,
        "latest",
        "Print the path of the newest complete checkpoint.",
        {1: "no checkpoint is complete"},
        more="Suspect and quarantined checkpoints are skipped, as a resume skips them.",
    )
    latest.add_argument("dir", metavar="DIR", help="output folder of a run")
    verify = _command(
        group, "verify", "Check whether checkpoints are complete.", {1: "at least one is not complete"}
    )
    verify.add_argument(
        "paths", nargs="+", metavar="PATH", help="checkpoint folder, or output folder for all in it"
    )
    verify.add_argument(
        "--checksum",
        action="store_true",
        help="read all files and compare the checksums that were saved with them",
    )


def _add_replay(group: Any) -> None:
    parser = _command(
        group,
        "replay",
        "Say what a detector would have found in past runs, and when.",
        {1: "with --fail-on-finding: there is a finding"},
        more="PATH is a trainer_state.json, a checkpoint, an output folder, a folder of runs, a file of log entries\n"
        "(JSON, JSON Lines, CSV, Parquet), a TensorBoard event file, a .wandb file or a database of trackio.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument(
        "--detector", choices=_DETECTORS, default="adaptive", help="detector (default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the detector, such as threshold=1.0; may be repeated",
    )
    parser.add_argument("--metric", default="loss", metavar="KEY", help="log key to watch (default: loss)")
    parser.add_argument("--plot", action="store_true", help="draw the curve with onset and finding")
    parser.add_argument("--fail-on-finding", action="store_true", help="exit with 1 if there is a finding")


def _add_tune(group: Any) -> None:
    parser = _command(
        group,
        "tune",
        "Find settings of a detector that are silent on healthy past runs and find the bad ones first.",
        {1: "no setting is silent on all healthy runs and finds all bad ones"},
        more="PATH is anything that `replay` reads. A run is bad if the default detector finds a fault in it from which\n"
        "it did not recover; --healthy and --bad overrule that. PATH@STEP names the first bad step.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="past runs, judged by a replay")
    parser.add_argument("--healthy", nargs="+", default=[], metavar="PATH", help="runs that went well")
    parser.add_argument("--bad", nargs="+", default=[], metavar="PATH[@STEP]", help="runs that went wrong")
    parser.add_argument("--detector", choices=_DETECTORS[:3], help="try only this one (default: all)")
    parser.add_argument("--metric", default="loss", metavar="KEY", help="log key to watch (default: loss)")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="rows to show (default: %(default)s)")


def _add_compare(group: Any) -> None:
    parser = _command(group, "compare", "Show runs side by side: loss, findings, best checkpoints.", {})
    parser.add_argument("dirs", nargs="+", metavar="DIR", help="output folders, or folders of them")
    _add_metric(parser)


def _add_watch(group: Any) -> None:
    parser = _command(
        group,
        "watch",
        "Show a running job: its loss, last findings and checkpoints, until it ends.",
        {},
        more="The loss is that of the newest checkpoint, or of the TensorBoard files in DIR/runs if they are further.\n"
        "End it with Ctrl-C.",
    )
    parser.add_argument("dir", metavar="DIR", help="output folder of a run")
    parser.add_argument("--once", action="store_true", help="show it once and end")
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="seconds between two looks (default: 5)"
    )
    parser.add_argument(
        "--values", type=int, default=600, metavar="N", help="draw the last N losses (default: %(default)s)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=5,
        metavar="N",
        help="findings and checkpoints to show (default: %(default)s)",
    )
    _add_metric(parser)


def _add_report(group: Any) -> None:
    parser = _command(
        group,
        "report",
        "Write one HTML page about a run: answer, curves, findings, checkpoints.",
        {},
        more="The page needs no network and no other file. Everything in it is from the files of the run.",
    )
    parser.add_argument("dir", metavar="DIR", help="output folder of a run")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="where to write it, - for standard output (default: NAME-report.html)",
    )
    _add_metric(parser)


def _add_prune(group: Any) -> None:
    parser = _command(
        group,
        "prune",
        "Delete checkpoints that are neither among the last nor among the best.",
        {1: "with --yes: a checkpoint could not be deleted"},
        more="Without --yes nothing is deleted: the command lists what would be. It never deletes the newest complete\n"
        "checkpoint, what a rollback or a stopped run needs, or what is unreadable, linked or outside of DIR.",
    )
    parser.add_argument("dir", metavar="DIR", help="output folder of a run")
    _add_keep(parser)
    parser.add_argument(
        "--weights-only-older-than",
        metavar="AGE",
        help="of those that stay, reduce older ones to their weights: 45m, 12h, 7d. Training cannot be resumed from them",
    )
    _add_metric(parser)
    parser.add_argument("--yes", action="store_true", help="delete")


def _add_run(group: Any) -> None:
    parser = _command(
        group,
        "run",
        "Run a training script that does not use hf_divguard, with its Trainer guarded.",
        {1: "or any other code: that of the command", 127: "the command was not found"},
        more="The options are those of DivGuardTrainingArguments (docs/arguments.md). Without --divguard_detector the\n"
        "detector is `adaptive`. Output, exit code and tracebacks are those of the command.",
        has_json=False,
    )
    parser.usage = (
        "hf-divguard run [--options FILE] [--divguard_detector adaptive] [OPTION ...] -- COMMAND ..."
    )
    parser.add_argument("--options", metavar="FILE", help="YAML or JSON file with options")
