"""Writes the folder of an incident: finding, last steps, rows, versions and arguments."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hf_divguard.core.curve_picture import curve_picture
from hf_divguard.core.events import EVENT_VERSION, headline
from hf_divguard.core.private import without_secrets
from hf_divguard.hf.host import Host
from hf_divguard.hf.recent_steps import RecentSteps
from hf_divguard.storage.incident_folder import remove_old_incidents, write_incident

__all__ = ["Incidents", "versions"]

logger = logging.getLogger(__name__)

_HAS_FOLDER = frozenset({"warned", "stopped", "aborted", "rollback", "not_rolled_back", "gave_up", "data"})
_PACKAGES = ("hf_divguard", "transformers", "torch", "accelerate", "datasets", "peft", "trl", "deepspeed")
_EVALUATIONS, _ROWS, _TEXTS, _TEXT_LENGTH = 20, 200, 64, 400
_COLUMNS = ("step", "loss", "grad_norm", "learning_rate")


class Incidents:
    """Writes a folder for each event that has a fault behind it, on rank 0.

    Args:
        host: The host.
        run_dir: The run folder.
        recent: The last steps.
        rows: Returns the rows that stood out so far.
        keep: How many folders stay; the oldest go first. 0 writes none.
    """

    def __init__(
        self,
        host: Host,
        run_dir: str,
        recent: RecentSteps,
        rows: Callable[[], list[dict[str, int]]],
        keep: int,
    ) -> None:
        self._host = host
        self._run_dir = run_dir
        self._recent = recent
        self._rows = rows
        self._keep = keep

    def write(self, event: Mapping[str, Any]) -> None:
        """Write the folder of ``event``, if it is of a kind that has one. A failure is a warning."""
        if self._keep <= 0 or event["event"] not in _HAS_FOLDER:
            return
        try:
            self._write(event)
            remove_old_incidents(self._run_dir, self._keep)
        except Exception as error:  # a record must not end what it records
            logger.warning(
                "The record of the incident at step %s could not be written (%s: %s).",
                event["step"],
                type(error).__name__,
                error,
            )

    def _write(self, event: Mapping[str, Any]) -> None:
        records = [each for each in self._recent.records if each.step <= event["step"]]
        marks = {"onset": event["onset_step"], event["event"]: event["step"]}
        series = {name: [getattr(each, name) for each in records] for name in _COLUMNS[1:]}
        steps = [each.step for each in records] or [event["step"]]
        write_incident(
            self._run_dir,
            event["step"],
            self._content(event),
            columns=_COLUMNS,
            rows=[[getattr(each, name) for name in _COLUMNS] for each in records],
            picture=curve_picture(steps, series, marks, headline(event)),
        )

    def _content(self, event: Mapping[str, Any]) -> dict[str, Any]:
        host = self._host
        onset, last = event["onset_step"], event["step"]
        rows = [row for row in self._rows() if onset <= row["step"] <= last]
        log = [entry for entry in host.state.log_history if any(key.startswith("eval_") for key in entry)]
        return {
            "version": EVENT_VERSION,
            "event": event,
            "steps": {"onset": onset, "last": last},
            "rows": rows[-_ROWS:],
            "text": self._texts(onset, last),
            "evaluations": log[-_EVALUATIONS:],
            "run": {
                "processes": host.args.world_size,
                "device": str(host.args.device),
                "model": type(host.model).__name__,
                "trainer": type(host.trainer).__name__,
                "epoch": host.state.epoch,
                "max_steps": host.state.max_steps,
            },
            "versions": versions(),
            "arguments": without_secrets(host.args.to_dict()),
        }

    def _texts(self, onset: int, last: int) -> list[dict[str, Any]]:
        """Return the text of the rows of the steps of the fault, where they were kept and can be decoded."""
        tokenizer = getattr(self._host.trainer, "processing_class", None)
        decode = getattr(tokenizer, "decode", None) or getattr(
            getattr(tokenizer, "tokenizer", None), "decode", None
        )
        found: list[dict[str, Any]] = []

        def text_of(tokens: list[int]) -> str | None:
            try:
                return None if decode is None else str(decode(tokens))[:_TEXT_LENGTH]
            except Exception:  # ids that are no words, as where labels are masked
                return None

        for step in range(max(onset, last - _TEXTS), last + 1):
            for micro_batch, rows in enumerate(self._recent.rows_of(step)):
                for row, tokens in enumerate(rows):
                    text = text_of(tokens)
                    found.append(
                        {
                            "step": step,
                            "micro_batch": micro_batch,
                            "row": row,
                            "text": text,
                            "tokens": None if text is not None else tokens[:_TEXT_LENGTH],
                        }
                    )
        return found[:_TEXTS]


def versions() -> dict[str, str]:
    """Return the versions of Python, the system and the packages that are in use."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        if name in sys.modules:
            module = sys.modules[name]
            found[name] = str(getattr(module, "__version__", None) or _installed(name))
    return found


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
