"""Rulings in numbers and words, for findings, events and log lines."""

from __future__ import annotations

import math

from hf_divguard.core.findings import Finding
from hf_divguard.core.rollback.ruling import Ruling

__all__ = ["damage_finding", "evaluated_finding", "rounded", "why", "wrong_labels_finding"]


def rounded(ruling: Ruling) -> dict[str, float]:
    """Return the numbers of a comparison to six digits; without those that are not finite."""
    numbers = ruling.verdict.numbers if ruling.verdict is not None else {}
    return {name: float(f"{value:.6g}") for name, value in numbers.items() if math.isfinite(value)}


def why(ruling: Ruling) -> str:
    """Return why nothing is undone."""
    numbers = rounded(ruling)
    if "kept_loss" not in numbers:
        return "kept weights do no better on the batches that come now"
    present = "that of the present ones is not finite"
    if "present_loss" in numbers:
        present = f"the present ones {numbers['present_loss']:.4g}"
    usual = f" (usual: {numbers['usual_loss']:.4g})" if "usual_loss" in numbers else ""
    return f"kept weights have a loss of {numbers['kept_loss']:.4g} on the batches that come now, {present}{usual}"


def damage_finding(ruling: Ruling, step: int, since: int) -> Finding:
    """Return the finding that kept weights do better than the present ones.

    Args:
        ruling: What the comparison has shown.
        step: Present step.
        since: Step at which the incident began.
    """
    numbers = rounded(ruling)
    present = numbers.get("present_loss", math.nan)
    message = (
        f"On the batches that come after step {step} the weights of step {ruling.good_step} have a loss of "
        f"{numbers.get('kept_loss', math.nan):.4g}, the present ones {present:.4g}."
    )
    return _finding(ruling, step, since, message)


def evaluated_finding(ruling: Ruling, step: int, since: int) -> Finding:
    """Return the finding that kept weights do better on the evaluation set than those that bad data have left.

    Args:
        ruling: What the comparison has shown.
        step: Present step.
        since: Step since which the data are unlike those of before.
    """
    numbers = rounded(ruling)
    present, kept = numbers.get("present_loss", math.nan), numbers.get("kept_loss", math.nan)
    message = (
        f"The data have been unlike those of before since step {since}, and on the evaluation set the weights of step "
        f"{ruling.good_step} have a loss of {kept:.4g}, those of step {step} one of {present:.4g}."
    )
    return _finding(ruling, step, since, message)


def wrong_labels_finding(ruling: Ruling, step: int, since: int) -> Finding:
    """Return the finding that labels were wrong for some steps, and that kept weights do better now that they are right.

    Args:
        ruling: What the comparison has shown.
        step: Present step.
        since: Step since which the labels were wrong.
    """
    numbers = rounded(ruling)
    present, kept = numbers.get("present_loss", math.nan), numbers.get("kept_loss", math.nan)
    message = (
        f"From step {since} on the labels contradicted what the model had learnt, for inputs like those of before. The "
        f"labels of before are back after step {step}: on these batches the weights of step {ruling.good_step} have a "
        f"loss of {kept:.4g}, the present ones {present:.4g}."
    )
    return _finding(ruling, step, since, message)


def _finding(ruling: Ruling, step: int, since: int, message: str) -> Finding:
    numbers = rounded(ruling)
    return Finding(
        step=step,
        onset_step=min(since, step),
        kind="damage",
        severity="error",
        metric="loss",
        value=numbers.get("present_loss", math.nan),
        limit=numbers.get("kept_loss"),
        message=message,
        evidence={"kept_step": ruling.good_step, **numbers},
        cause=ruling.cause,
    )
