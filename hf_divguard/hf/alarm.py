"""What one rank has to report to ranks that wait: an error, through the store that the ranks met by."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

__all__ = ["Alarm"]

_LOOK_SECONDS = 0.5
_RANG, _ARRIVED = "error", "arrived"


class Alarm:
    """An error that ends all ranks, and who has come to which exchange.

    Looking costs a round trip to the store, where an exchange of all ranks would wait for a rank
    that never comes. A store that does not answer has nothing to report.

    Args:
        name: Name of this training, the same on all ranks.
    """

    def __init__(self, name: str) -> None:
        store = dist.distributed_c10d._get_default_store()
        self._store: Any = dist.PrefixStore(f"divguard/{name}", store)  # type: ignore[attr-defined]
        self._heard: str | None = None
        self._looked = 0.0

    def ring(self, message: str) -> None:
        """Report ``message`` to all ranks; the first of several counts."""
        with contextlib.suppress(RuntimeError, ValueError):
            self._store.compare_set(_RANG, "", message)

    def message(self, patience: float = 0.0) -> str | None:
        """Return what was reported first, ``None`` if nothing is within ``patience`` seconds."""
        until = time.monotonic() + patience
        while self._heard is None:
            try:
                if self._store.check([_RANG]):
                    self._heard = self._store.get(_RANG).decode(errors="replace")
            except (RuntimeError, ValueError):
                break
            if time.monotonic() >= until:
                break
            time.sleep(0.05)
        return self._heard

    def look(self) -> str | None:
        """Return what was reported, looking not too often: for loops that wait."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return self._heard
        self._looked = time.monotonic()
        return self.message()

    def arrive(self, exchange: int) -> None:
        """Note that this rank has come to an exchange."""
        with contextlib.suppress(RuntimeError, ValueError):
            self._store.add(f"{_ARRIVED}/{exchange}", 1)

    def wait_for(self, ranks: int, exchange: int, patience: float) -> bool:
        """Return whether so many ranks come to an exchange within ``patience`` seconds."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            try:
                if self._store.add(f"{_ARRIVED}/{exchange}", 0) >= ranks:
                    return True
            except (RuntimeError, ValueError):
                break
            time.sleep(0.05)
        return False

    def forget(self, exchange: int) -> None:
        """Remove the note of an exchange that all ranks have left."""
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            self._store.delete_key(f"{_ARRIVED}/{exchange}")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while this rank may be held in an exchange of the host; the store may end with the rank that has it."""
        ended = threading.Event()

        def listen() -> None:
            while not ended.wait(_LOOK_SECONDS) and self.message() is None:
                pass

        listener = threading.Thread(target=listen, name="divguard-alarm", daemon=True)
        listener.start()
        try:
            yield
        finally:
            ended.set()
            listener.join(1.0)
