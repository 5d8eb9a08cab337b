"""What was decided in a run: the first finding that ends it is kept, and an abort counts more than a stop."""

from __future__ import annotations

from hf_divguard.core.findings import Finding
from hf_divguard.core.outcome import RunOutcome


def finding(step: int) -> Finding:
    return Finding(
        step=step,
        onset_step=step,
        kind="jump",
        severity="error",
        metric="loss",
        value=9.0,
        limit=3.0,
        message=f"found at {step}",
    )


def test_the_first_finding_that_ends_the_run_is_kept() -> None:
    for action in ("stop", "abort"):
        outcome = RunOutcome()
        for step in (13, 14, 15):
            outcome.report(finding(step), action)  # type: ignore[arg-type]
        assert outcome.finding == finding(13)
        assert outcome.stop_reason == f"{action}: found at 13"


def test_an_abort_takes_the_place_of_a_stop_and_not_the_reverse() -> None:
    outcome = RunOutcome()
    outcome.report(finding(13), "stop")
    outcome.report(finding(14), "abort")
    outcome.report(finding(15), "stop")
    assert (outcome.finding, outcome.is_aborted) == (finding(14), True)
