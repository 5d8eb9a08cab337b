"""Runs functions in processes of their own: as the ranks of a run, under limits, killed by signals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.fork_server import ForkServer, Outcome


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Outcome]]]:
    """Return ``run(function, ranks=1, nodes=False, **options)``: runs a function on every rank of a run."""
    server = ForkServer(tmp_path_factory.mktemp("ranks"))
    yield server.run
    server.close()
