"""Restores a kept state or a checkpoint inside the loop, on all ranks or on none; the schedule keeps its place."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch

from hf_divguard.hf.engines import engine_of, supported
from hf_divguard.hf.engines.engine import InExchange
from hf_divguard.hf.host import Host
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.rates import follows_metrics, load_schedule
from hf_divguard.hf.snapshots import Snapshot, restore_random_states

__all__ = [
    "load_weights_on_all_ranks",
    "refuse_unsupported",
    "restore_checkpoint",
    "restore_snapshot",
    "resume_optimizer_on_all_ranks",
]


def refuse_unsupported(host: Host, options: Any) -> None:
    """Raise where weights and optimizer cannot be restored inside the running loop.

    Raises:
        ValueError: With what does not work and what does.
    """
    found = engine_of(host).unsupported()
    if found is not None:
        raise ValueError(
            f"`rollback` does not work with {found.what}: weights and optimizer cannot be restored there inside the "
            f"running loop. {found.advice}. Supported are {supported()}."
        )
    if host.args.save_only_model and options.divguard_snapshot_steps == 0:
        raise ValueError(
            "`rollback` needs the optimizer of a checkpoint, but `save_only_model=True` saves none. Set it to false, "
            "or keep states in memory with `divguard_snapshot_steps`."
        )


def restore_checkpoint(
    host: Host, checkpoint: str, ranks: Ranks, *, with_rng: bool, rate_factor: float, what: str
) -> None:
    """Load weights, optimizer and gradient scaler of ``checkpoint`` into the running trainer, on every rank.

    The parameter objects stay the same. The place of the learning-rate schedule, the data
    iterator and (unless asked for) the random number generators are left alone. A schedule
    that goes by evaluations is restored too: it must not conclude anything from those of the
    diverged stretch.

    Args:
        host: The host.
        checkpoint: Folder of the checkpoint.
        ranks: The processes of the run.
        with_rng: Also restore the random number generators.
        rate_factor: By how much the learning rate has been lowered for good since then.
        what: What is being done, for the sentence of an error.

    Raises:
        CheckpointError: On every rank, if one of them cannot read its part or lacks something
            that is trained. The weights are then as they were.
    """

    def read() -> Callable[[], None]:
        schedule = None
        if follows_metrics(host):
            path = os.path.join(checkpoint, "scheduler.pt")
            schedule = torch.load(path, map_location="cpu", weights_only=True)
        put = engine_of(host).read(checkpoint)

        def put_all() -> None:
            put()
            if schedule is not None:
                load_schedule(host, schedule, rate_factor)
            if host.scaler is not None:
                host.load_scaler(checkpoint)
            if with_rng:
                host.load_random_states(checkpoint)

        return put_all

    _on_all_ranks(host, ranks, read, what)


def restore_snapshot(
    host: Host,
    snapshot: Snapshot,
    ranks: Ranks,
    *,
    with_rng: bool = False,
    rate_factor: float = 1.0,
    weights_only: bool = False,
    what: str,
) -> None:
    """Put a snapshot into the running trainer, as :func:`restore_checkpoint` does with a checkpoint.

    Args:
        host: The host.
        snapshot: The snapshot; it stays as it is.
        ranks: The processes of the run.
        with_rng: Also restore the random number generators.
        rate_factor: By how much the learning rate has been lowered for good since then.
        weights_only: Put back the weights, and nothing else.
        what: What is being done, for the sentence of an error.

    Raises:
        CheckpointError: On every rank, if the optimizer of one of them holds a parameter that its
            snapshot lacks. Nothing is changed then.
    """
    engine = engine_of(host)

    def read() -> Callable[[], None]:
        engine.check(snapshot.state, snapshot.step)

        def put() -> None:
            engine.put_back(snapshot.state, weights_only=weights_only)
            if weights_only:
                return
            if follows_metrics(host):
                load_schedule(host, copy.deepcopy(snapshot.schedule), rate_factor)
            if host.scaler is not None and snapshot.scaler is not None:
                host.scaler.load_state_dict(snapshot.scaler)
            if with_rng:
                restore_random_states(snapshot.rng)

        return put

    _on_all_ranks(host, ranks, read, what)


def load_weights_on_all_ranks(host: Host, checkpoint: str, ranks: Ranks) -> None:
    """Load the weights of ``checkpoint`` on every rank, or on none.

    Raises:
        CheckpointError: On every rank, if one of them cannot; the weights are then as they were.
    """

    def read() -> Callable[[], None]:
        return engine_of(host).read(checkpoint, weights_only=True)

    _on_all_ranks(host, ranks, read, f"Loading the weights of {checkpoint}")


def resume_optimizer_on_all_ranks(host: Host, checkpoint: str, ranks: Ranks) -> None:
    """Load optimizer and schedule to resume from, on every rank or on none.

    Raises:
        CheckpointError: On every rank, if one of them cannot.
    """
    what = f"Loading the optimizer of {checkpoint}"
    _on_all_ranks(host, ranks, lambda: engine_of(host).read_to_resume(checkpoint), what)


def _on_all_ranks(host: Host, ranks: Ranks, read: Callable[[], Callable[[], None]], what: str) -> None:
    """Read on every rank; when all have, write what was read. An error of one rank is raised on all of them."""
    engine = engine_of(host)
    put, error = _tried(read)
    # Where others may be held in an exchange of the engine that this rank has left, it does not wait for them long.
    ranks.raise_if_any_failed(error, what, may_be_held=isinstance(error, InExchange))
    assert put is not None
    with engine.kept_on_error():
        _, error = _tried(put)
        ranks.raise_if_any_failed(error, what, may_be_held=engine.puts_together)


def _tried(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as caught:
        return None, caught
