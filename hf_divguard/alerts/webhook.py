"""A webhook: one POST of JSON, tried a few times. The address is a secret and appears in no text."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_divguard._version import __version__
from hf_divguard.alerts.alert import Alert
from hf_divguard.alerts.outbox import NotDeliveredError

__all__ = ["VARIABLES", "Webhook", "webhook_from_environment"]

VARIABLES = {
    "webhook": "DIVGUARD_WEBHOOK_URL",
    "slack": "DIVGUARD_SLACK_WEBHOOK_URL",
    "discord": "DIVGUARD_DISCORD_WEBHOOK_URL",
}
"""Environment variables with the addresses, by the kind of webhook."""

_ATTEMPTS = 3
_TIMEOUT_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 10.0
_TRY_AGAIN = frozenset({408, 425, 429})
_SLACK_LENGTH, _DISCORD_LENGTH = 3000, 1900


def _generic(alert: Alert) -> dict[str, Any]:
    return alert.to_dict()


def _slack(alert: Alert) -> dict[str, Any]:
    text = f"*{_escaped(alert.title)}*\n{_escaped(alert.text)}"
    return {"text": text[:_SLACK_LENGTH]}


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _discord(alert: Alert) -> dict[str, Any]:
    # Without this a name of a run that contains @everyone would call everyone.
    return {
        "content": f"**{alert.title}**\n{alert.text}"[:_DISCORD_LENGTH],
        "allowed_mentions": {"parse": []},
    }


_SHAPES: Mapping[str, Callable[[Alert], dict[str, Any]]] = {
    "webhook": _generic,
    "slack": _slack,
    "discord": _discord,
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: following it would turn the POST into a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing."""


@dataclass(frozen=True, repr=False)
class Webhook:
    """Sends alerts to one address.

    Args:
        kind: ``"webhook"``, ``"slack"`` or ``"discord"``: the shape of the JSON.
        url: The address.
        timeout: Seconds that one attempt may take to connect, and to answer.
        first_pause: Seconds before the second attempt; it doubles with each further one.
    """

    kind: str
    url: str
    timeout: float = _TIMEOUT_SECONDS
    first_pause: float = _FIRST_PAUSE_SECONDS

    def __call__(self, alert: Alert) -> None:
        """Deliver an alert.

        Raises:
            NotDeliveredError: If the last attempt has failed, or if a further one is of no use.
        """
        body = json.dumps(_SHAPES[self.kind](alert)).encode()
        pause = self.first_pause
        for attempt in range(1, _ATTEMPTS + 1):
            problem, is_final, asked_pause = self._try(body, alert.id)
            if problem is None:
                return
            if is_final or attempt == _ATTEMPTS:
                raise NotDeliveredError(f"{problem}, {attempt} attempt{'s' if attempt > 1 else ''}")
            time.sleep(min(asked_pause or pause, _LONGEST_PAUSE_SECONDS))
            pause *= 2

    def _try(self, body: bytes, identity: str) -> tuple[str | None, bool, float | None]:
        """Send once. Return the problem, whether trying again is of no use, and the pause that the server asks for."""
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"hf-divguard/{__version__}",
            "Idempotency-Key": identity,
        }
        try:
            request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
            opener = urllib.request.build_opener(_NoRedirect)
            with opener.open(request, timeout=self.timeout):
                return None, True, None
        except urllib.error.HTTPError as error:
            with error:
                is_final = error.code < 500 and error.code not in _TRY_AGAIN
                return f"HTTP {error.code}", is_final, _seconds(error.headers.get("Retry-After"))
        except urllib.error.URLError as error:
            return _without_address(error.reason), False, None
        except Exception as error:  # a broken answer, a connection that ended: the text may hold the address
            return _without_address(error), isinstance(error, ValueError), None


def _without_address(reason: Any) -> str:
    if isinstance(reason, OSError) and reason.strerror and reason.errno is not None:
        return reason.strerror
    return "it took too long" if isinstance(reason, TimeoutError) else type(reason).__name__


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None


def webhook_from_environment(kind: str) -> Webhook:
    """Return the webhook of a kind, with the address from its environment variable.

    Raises:
        ValueError: If the variable is not set, or is no address of a web server.
    """
    variable = VARIABLES[kind]
    url = os.environ.get(variable, "").strip()
    if not url:
        raise ValueError(
            f"`divguard_alerts` contains {kind!r}, but the environment variable {variable} is not set. Set it to the "
            "address of the webhook; it is not an option because it is a secret."
        )
    try:
        parts = urllib.parse.urlsplit(url)
        is_web = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_web = False
    if not is_web:
        raise ValueError(f"{variable} must be an address that begins with https:// or http://.")
    return Webhook(kind, url)
