"""What alerts cost a run: time per step against the same run without alerts, with servers that work and that do not.

    python -m benchmarks.alert_cost [--short] [--repeats N] [--blocks N] [--output docs/alert-cost.md]

Two guarded runs of the same model take turns in this process, as in ``benchmarks/step_overhead.py``. Both find something
in every other step and go on; one of them sends alerts.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.machine import machine
from benchmarks.step_overhead import BLOCK, STOCK_MS, Setting, interval, measure, race
from hf_divguard.alerts.alerts import Alerts
from hf_divguard.alerts.outbox import Outbox
from hf_divguard.alerts.rate import RateLimit
from hf_divguard.alerts.webhook import VARIABLES, Webhook
from hf_divguard.hf.detectors import DivergenceDetector
from tests.alerts.servers import never_answering, refusing, serving
from tests.hf.faults import ScriptedRule

STEPS = 10_000
WARNS = {"logging_steps": 1, "divguard_incidents": 0, "divguard_compare": "off"}
EVENT = {"event": "warned", "step": 1, "finding": {"kind": "jump", "message": "A loss."}}


def finds_something() -> list[Any]:
    """Return a detector that warns in every other step."""
    rule = ScriptedRule({step: step for step in range(2, STEPS, 2)})
    return [DivergenceDetector(rule, action="warn")]


@contextmanager
def answering() -> Iterator[str]:
    """Yield the address of a server that works."""
    with serving(204) as server:
        yield server.url


ROWS: list[tuple[str, Any]] = [
    ("none: no alerts (control)", None),
    ("answers at once", answering),
    ("refuses connections", refusing),
    ("takes connections and never answers", never_answering),
]


def setting(name: str, *, with_alerts: bool) -> Setting:
    """Return the row of one server."""
    options = {**WARNS, "divguard_alerts": "webhook"} if with_alerts else WARNS
    return Setting(name, True, options, WARNS, stock_is_guarded=True, callbacks=finds_something)


def posting_microseconds(url: str, number: int = 2000) -> float:
    """Return the CPU time that the training thread spends on one alert."""
    alerts = Alerts([Outbox("webhook", Webhook("webhook", url))], {}, RateLimit(burst=number))
    alerts.post(EVENT)  # starts the thread
    began = time.thread_time()
    for _ in range(number):
        alerts.post(EVENT)
    return (time.thread_time() - began) / number * 1e6


def delivering_milliseconds(url: str) -> tuple[float, float]:
    """Return CPU time of this process, and wall time, from one alert to the end of the last attempt to deliver it."""
    alerts = Alerts([Outbox("webhook", Webhook("webhook", url))], {})
    began, cpu = time.perf_counter(), time.process_time()
    alerts.post(EVENT)
    alerts.close(seconds=60.0)  # this thread only waits
    return (time.process_time() - cpu) * 1e3, (time.perf_counter() - began) * 1e3


def direct() -> str:
    """Return the part of the page that is measured apart from training."""
    with refusing() as url:
        posting = min(posting_microseconds(url) for _ in range(5))
    lines = []
    for name, server in ROWS[1:]:
        with server() as url:
            best = min((delivering_milliseconds(url) for _ in range(3)), key=lambda each: each[0])
        share = f"{best[0] / best[1]:.2%}" if best[1] > 1000 else "-"
        lines.append(f"| {name} | {best[0]:.1f} ms | {best[1] / 1e3:.1f} s | {share} |")
    rows = "\n".join(lines)
    return f"""Handing an alert to the queue takes the training thread {posting:.0f} microseconds, whatever the server
does. The rest is the work of the other thread. This is the CPU time of the whole process for one alert:

| webhook server | CPU time | lasts | share |
|---|---|---|---|
{rows}

The server that answers runs in the same process, and its work is in the first row.
"""


def page(results: list[dict[str, Any]], repeats: int, blocks: int, apart: str) -> str:
    """Return the page of the documentation."""
    rows = "\n".join(
        f"| {row['name']} | {interval(row['cpu'])} | {interval(row['wall'])} |" for row in results
    )
    step_ms = statistics.median(STOCK_MS)
    return f"""# What alerts cost

Time of a training step with alerts, divided by that of the same guarded run without alerts; 1.000 is no difference.
Both runs find something in every other step. Five alerts are sent at once and then one in ten minutes.

| webhook server | CPU time | wall time |
|---|---|---|
{rows}

The first row compares the run with itself and shows the noise. Two runs take turns in one process, {BLOCK} steps each. A
race is {blocks} such turns; its ratio is the median over them. A row is the median of {repeats} races; the brackets
contain the median in 95 of 100 resamplings of the races.

A step takes {step_ms:.1f} ms of CPU time here.

## Apart from training

{apart}
At the end of the run `train()` waits for alerts that are still on their way, at most 5 seconds.

Measured with one thread, on a machine shared with other work. {machine()}

```bash
make bench-alerts BENCH="--repeats {repeats} --blocks {blocks} --output docs/alert-cost.md"
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=8, help="races per server")
    parser.add_argument("--blocks", type=int, default=20, help="turns of ten steps in each race")
    parser.add_argument("--short", action="store_true", help="two short races each, to see that it runs")
    parser.add_argument("--output", type=Path, help="write the page here as well")
    options = parser.parse_args()
    repeats, blocks = (2, 4) if options.short else (options.repeats, options.blocks)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("hf_divguard").setLevel(logging.CRITICAL)
    Alerts.close.__defaults__ = (0.2,)  # what is still waiting at the end is no part of a step
    race(setting("", with_alerts=False), 1, measured_first=True)
    STOCK_MS.clear()
    results = []
    for name, server in ROWS:
        with ExitStack() as stack:
            if server is not None:
                os.environ[VARIABLES["webhook"]] = stack.enter_context(server())
            row = setting(name, with_alerts=server is not None)
            results.append(measure(row, repeats, blocks, lambda line: print(line, flush=True)))
    text = page(results, repeats, blocks, direct())
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
