"""Alerts through the trackers that have alerts of their own: W&B and Trackio."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from hf_divguard.alerts.alert import Alert
from hf_divguard.alerts.outbox import NotDeliveredError

__all__ = ["SERVICES", "service"]

_LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR"}


def _to_wandb(alert: Alert) -> None:
    wandb: Any = importlib.import_module("wandb")
    if wandb.run is None:
        raise NotDeliveredError("there is no run of W&B: `report_to` does not contain 'wandb'")
    # W&B leaves out alerts of one title that follow within a minute; how many are sent is limited here.
    level = wandb.AlertLevel[_LEVELS[alert.level]]
    wandb.run.alert(title=alert.title, text=alert.text, level=level, wait_duration=0)


def _to_trackio(alert: Alert) -> None:
    trackio: Any = importlib.import_module("trackio")
    try:
        trackio.alert(title=alert.title, text=alert.text, level=trackio.AlertLevel[_LEVELS[alert.level]])
    except RuntimeError:
        raise NotDeliveredError(
            "there is no run of Trackio: `report_to` does not contain 'trackio'"
        ) from None


SERVICES: dict[str, Callable[[Alert], None]] = {"wandb": _to_wandb, "trackio": _to_trackio}
"""What delivers an alert, by the name of the tracker."""


def service(name: str) -> Callable[[Alert], None]:
    """Return what delivers alerts through a tracker.

    Raises:
        ValueError: If the tracker is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"`divguard_alerts` contains {name!r}, but {name} is not installed: pip install {name}. Or leave it out."
        )
    return SERVICES[name]
