"""What follows from a look at the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_divguard.core.findings import Cause
from hf_divguard.core.rollback.comparison import Verdict

__all__ = ["Ruling"]

Act = Literal["none", "act", "dismiss"]


@dataclass(frozen=True, slots=True)
class Ruling:
    """What to do after a look.

    Args:
        act: ``"act"``: roll back or stop; ``"dismiss"``: what the curve asked for is not done;
            ``"none"``: nothing, as yet.
        cause: The cause that a finding names.
        good_step: Step of the kept state that does best.
        verdict: The comparison.
    """

    act: Act
    cause: Cause = "unknown"
    good_step: int = 0
    verdict: Verdict | None = None
