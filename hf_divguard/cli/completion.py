"""The command ``completion``: prints what a shell needs to complete command lines of ``hf-divguard``."""

from __future__ import annotations

import argparse
from typing import Any

from hf_divguard.cli.exits import OK

__all__ = ["run_completion"]

_BASH = """\
_hf_divguard() {{
    local words
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) words="{commands}" ;;
    esac
    [ "$COMP_CWORD" -eq 1 ] && words="{commands}"
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _hf_divguard hf-divguard
"""


def run_completion(options: Any) -> int:
    """Print the completion script of a shell."""
    flags = _flags_by_command()
    if options.shell == "fish":
        for name, words in flags.items():
            print(f"complete -c hf-divguard -n __fish_use_subcommand -a {name}")
            for word in words:
                kind = f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}"
                print(f"complete -c hf-divguard -n '__fish_seen_subcommand_from {name}' {kind}")
        return OK
    if options.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    cases = "\n".join(f'        {name}) words="{" ".join(words)}" ;;' for name, words in flags.items())
    print(_BASH.format(cases=cases, commands=" ".join(flags)), end="")
    return OK


def _flags_by_command() -> dict[str, list[str]]:
    from hf_divguard.cli.main import make_parser

    groups = [each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    return {
        name: [flag for action in parser._actions for flag in action.option_strings]
        for name, parser in groups[0].choices.items()
    }
