"""Web servers for alerts: they answer as they are asked to, note what they got, or never answer."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Answers the first requests with given codes, and all others with the last of them.

    Args:
        answers: The codes.
        headers: Headers of each answer.
    """

    daemon_threads = True

    def __init__(self, answers: Sequence[int], headers: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.headers = list(answers), headers
        self.requests: list[dict[str, Any]] = []
        self.bodies: list[Any] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """The address, with a path that is a secret."""
        return f"http://127.0.0.1:{self.server_address[1]}/hooks/SECRET-PATH"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when a client has gone."""


class Handler(BaseHTTPRequestHandler):
    """Notes a request and answers it."""

    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests.append(dict(self.headers))
            self.server.bodies.append(json.loads(body))
            answers = self.server.answers
            code = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(code)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


@contextlib.contextmanager
def serving(*answers: int, **headers: str) -> Iterator[Server]:
    """Serve in a thread while inside a ``with`` block."""
    server = Server(answers or (200,), {name.replace("_", "-"): value for name, value in headers.items()})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def never_answering() -> Iterator[str]:
    """Yield the address of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hooks/SECRET-PATH"


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """Yield the address of a port that refuses connections."""
    with socket.socket() as bound:  # bound, so that nobody else gets it, and not listening
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/hooks/SECRET-PATH"
