"""Ends the process with a code of its own after a run that diverged, where that is asked for."""

from __future__ import annotations

import sys

from hf_divguard.core.outcome import RunOutcome
from hf_divguard.errors import TrainingDivergedError
from hf_divguard.hf.ranks import Ranks

__all__ = ["end_diverged"]


def end_diverged(
    error: TrainingDivergedError | None, outcome: RunOutcome, ranks: Ranks, code: int | None
) -> None:
    """At the end of ``train()``: raise if the run diverged and that is to end it.

    Args:
        error: The error of a run in which rollbacks did not help.
        outcome: What was decided in the run.
        ranks: The processes of the run.
        code: The exit code that is asked for; ``None`` for none.

    Raises:
        TrainingDivergedError: ``error``, where no code is asked for.
        SystemExit: With ``code``, after a stop, an abort or rollbacks that did not help, when all
            ranks are ready to end.
    """
    if error is not None and code is None:
        raise error
    if code is None or (error is None and outcome.stopped_by is None):
        return
    if ranks.rank == 0:
        print(error if error is not None else outcome.stop_reason, file=sys.stderr)
    # A launcher kills the other ranks as soon as one has ended.
    ranks.gather(None)
    raise SystemExit(code)
