"""A webhook on a real server: delivered once, tried again with a bound, and its address in no text."""

from __future__ import annotations

import time
from typing import Any

import pytest

from hf_divguard.alerts.alert import alert_of
from hf_divguard.alerts.outbox import NotDeliveredError
from hf_divguard.alerts.webhook import VARIABLES, Webhook, webhook_from_environment
from tests.alerts.servers import never_answering, refusing, serving

EVENT: dict[str, Any] = {
    "event": "stopped",
    "step": 207,
    "onset_step": 200,
    "last_good_checkpoint": "out/checkpoint-160",
    "finding": {"kind": "jump", "message": "`loss` = 9 at step 207 is above its limit 2.4.", "cause": None},
}
RUN = {"name": "night <@everyone>", "output_dir": "out"}


def send(url: str, kind: str = "webhook", timeout: float = 5.0) -> None:
    Webhook(kind, url, timeout=timeout, first_pause=0.01)(alert_of(EVENT, RUN))


def test_an_alert_is_delivered_once_with_the_event_in_it() -> None:
    with serving(204) as server:
        send(server.url)
    [body], [headers] = server.bodies, server.requests
    assert body["event"] == EVENT
    assert (body["version"], body["level"], body["run"]) == (1, "error", RUN)
    assert body["title"] == "night <@everyone>: Training was stopped at step 207 (jump)"
    assert "Last good checkpoint: out/checkpoint-160." in body["text"]
    assert headers["Content-Type"] == "application/json"
    assert headers["Idempotency-Key"] == body["id"]


def test_slack_and_discord_get_their_shapes_and_nobody_is_called() -> None:
    with serving() as server:
        send(server.url, "slack")
        send(server.url, "discord")
    slack, discord = server.bodies
    assert slack.keys() == {"text"}
    assert slack["text"].startswith("*night &lt;@everyone&gt;: Training was stopped at step 207")
    assert discord.keys() == {"content", "allowed_mentions"}
    assert discord["allowed_mentions"] == {"parse": []}
    assert "above its limit 2.4" in discord["content"]


@pytest.mark.parametrize(
    ("answers", "requests", "is_delivered"),
    [
        ((503, 500, 200), 3, True),
        ((429, 200), 2, True),
        ((503,), 3, False),
        ((404,), 1, False),
        ((302,), 1, False),
    ],
    ids=["recovers", "too many", "never recovers", "no such hook", "redirect"],
)
def test_it_is_tried_again_with_a_bound_and_only_where_that_can_help(
    answers: tuple[int, ...], requests: int, is_delivered: bool
) -> None:
    with serving(*answers, Location="http://127.0.0.1:9/elsewhere") as server:
        if is_delivered:
            send(server.url)
        else:
            with pytest.raises(NotDeliveredError, match=f"HTTP {answers[-1]}, {requests} attempt"):
                send(server.url)
    assert len(server.bodies) == requests
    assert len({body["id"] for body in server.bodies}) == 1


def test_the_pause_that_a_server_asks_for_is_kept() -> None:
    with serving(429, 200, Retry_After="0.3") as server:
        began = time.monotonic()
        send(server.url)
    assert 0.3 <= time.monotonic() - began < 2.0


@pytest.mark.parametrize("kind", ["refusing", "never answering", "no such host", "no web server"])
def test_a_dead_server_is_an_error_without_the_address(kind: str) -> None:
    with refusing() as refused, never_answering() as silent:
        url = {
            "refusing": refused,
            "never answering": silent,
            "no such host": "http://no-such-host.invalid/hooks/SECRET-PATH",
            "no web server": "http://127.0.0.1:SECRET-PATH/",
        }[kind]
        began = time.monotonic()
        with pytest.raises(NotDeliveredError) as caught:
            send(url, timeout=0.2)
    assert time.monotonic() - began < 10.0
    text = str(caught.value)
    assert "SECRET" not in text
    assert "127.0.0.1" not in text
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("kind", VARIABLES)
def test_the_address_comes_from_the_environment_and_is_checked(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLES[kind], raising=False)
    with pytest.raises(ValueError, match=f"the environment variable {VARIABLES[kind]} is not set"):
        webhook_from_environment(kind)
    for wrong in ("file:///etc/SECRET", "SECRET", "http://", "https://[SECRET"):
        monkeypatch.setenv(VARIABLES[kind], wrong)
        with pytest.raises(ValueError, match="must be an address") as caught:
            webhook_from_environment(kind)
        assert "SECRET" not in str(caught.value)
    monkeypatch.setenv(VARIABLES[kind], "https://example.org/SECRET")
    assert "SECRET" not in repr(webhook_from_environment(kind))
