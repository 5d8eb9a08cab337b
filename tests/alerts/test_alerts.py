"""Alerts never hold up whoever posts them: a queue with a bound, a thread, a limit on how many."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest

from hf_divguard.alerts.alert import Alert, alert_of
from hf_divguard.alerts.alerts import Alerts, make_alerts
from hf_divguard.alerts.outbox import Outbox
from hf_divguard.alerts.rate import RateLimit
from hf_divguard.alerts.webhook import Webhook
from tests.alerts.servers import never_answering, serving


def event(step: int, name: str = "warned") -> dict[str, Any]:
    return {"event": name, "step": step, "finding": {"kind": "jump", "message": f"At step {step}."}}


def test_alerts_come_in_order_and_all_of_them() -> None:
    with serving() as server:
        alerts = Alerts([Outbox("webhook", Webhook("webhook", server.url))], {"name": "run"})
        for step in (1, 2, 3):
            alerts.post(event(step))
        alerts.close()
    assert [body["event"]["step"] for body in server.bodies] == [1, 2, 3]


def test_a_run_without_events_starts_no_thread() -> None:
    before = threading.active_count()
    alerts = make_alerts((), {"hook": print}, {})
    assert threading.active_count() == before
    alerts.close()


def test_more_than_the_limit_is_left_out_and_said_but_the_end_always_comes() -> None:
    got: list[Alert] = []
    alerts = Alerts([Outbox("list", got.append)], {}, RateLimit(burst=2, every_seconds=1000))
    for step in range(1, 8):
        alerts.post(event(step))
    alerts.post(event(8, "stopped"))
    alerts.close()
    assert [alert.event["step"] for alert in got] == [1, 2, 8]
    assert "5 further alerts were left out since the last one." in got[-1].text


def test_what_is_no_matter_for_people_is_not_sent() -> None:
    got: list[Alert] = []
    alerts = Alerts([Outbox("list", got.append)], {})
    for name in ("dismissed", "update_skipped", "rollback", "gave_up"):
        alerts.post(event(1, name))
    alerts.close()
    assert [alert.event["event"] for alert in got] == ["rollback", "gave_up"]


def test_posting_to_a_server_that_never_answers_takes_no_time(caplog: pytest.LogCaptureFixture) -> None:
    with never_answering() as url, caplog.at_level(logging.WARNING, logger="hf_divguard"):
        alerts = Alerts([Outbox("webhook", Webhook("webhook", url, timeout=0.5))], {}, RateLimit(burst=10**6))
        began = time.perf_counter()
        for step in range(1000):
            alerts.post(event(step))
        posted = time.perf_counter() - began
        began = time.monotonic()
        alerts.close(seconds=0.3)
        closed = time.monotonic() - began
    assert posted < 0.5
    assert closed < 0.6
    assert "SECRET" not in caplog.text
    assert caplog.text.count("could not be delivered") == 1  # the queue has a bound, said once
    assert "were not delivered within 0.3 s" in caplog.text


def test_a_hook_that_raises_or_hangs_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    got: list[dict[str, Any]] = []
    hangs = threading.Event()

    def raises(seen: dict[str, Any]) -> None:
        raise RuntimeError("token SECRET")

    alerts = make_alerts(
        (), {"raises": raises, "hangs": lambda seen: hangs.wait(60), "works": got.append}, {}
    )
    with caplog.at_level(logging.WARNING, logger="hf_divguard"):
        alerts.post(event(1))
        alerts.post(event(2))
        alerts.close(seconds=0.3)
    hangs.set()
    assert [each["step"] for each in got] == [1, 2]
    assert "could not be delivered to raises (RuntimeError)" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_hook_gets_a_copy_of_the_event() -> None:
    original = event(1)
    alerts = make_alerts((), {"clears": lambda seen: seen.clear()}, {})
    alerts.post(original)
    alerts.close()
    assert original == event(1)


def test_an_alert_names_the_way_out() -> None:
    assert (
        alert_of(event(3, "gave_up"), {"output_dir": "out"}).text == "At step 3. There is no good checkpoint."
    )
