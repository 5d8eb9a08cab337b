"""The loss of kept and of present weights on a micro-batch, leaving no trace in the run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch

from hf_divguard.hf.engines import engine_of
from hf_divguard.hf.host import Host
from hf_divguard.hf.policy_gradients import policy_gradient_class
from hf_divguard.hf.ranks import Ranks
from hf_divguard.hf.recent_batches import StepBatches

__all__ = ["probe", "probe_on_all_ranks", "random_states_kept", "why_not_comparable"]


def why_not_comparable(host: Host) -> str | None:
    """Return why no losses can be compared in this run, ``None`` if they can."""
    policy = policy_gradient_class(host.trainer)
    if policy is not None:
        return f"the loss of {policy} does not measure progress"
    if host.prepares_inputs_itself:
        return "the trainer prepares its inputs in a way of its own (`_prepare_inputs`)"
    return engine_of(host).why_not_compared()


def probe(
    host: Host,
    batches: list[Any],
    num_items: Any,
    tensors: Mapping[str, torch.Tensor] | None,
    count: int | None = None,
) -> list[float]:
    """Return the loss of each micro-batch with the present weights, or with kept ones.

    In evaluation mode, without gradients. Training modes, buffers, random states and the
    metrics that a trainer collects are put back.

    Args:
        host: The host.
        batches: The micro-batches, as the data loader gave them.
        num_items: Number of items in all of them, as the host counts them.
        tensors: Kept parameters and buffers by name; ``None`` for the present ones.
        count: Number of micro-batches of the step, where that is more than these.
    """
    losses = []
    with (
        _modes_kept(host.model),
        random_states_kept(),
        host.metrics_kept(),
        engine_of(host).swapped(tensors or {}),
        torch.no_grad(),
    ):
        host.model.eval()
        for inputs in batches:
            losses.append(host.loss_of(inputs, num_items, count or len(batches)))
    return [float(loss) for loss in losses]


def probe_on_all_ranks(
    host: Host, ranks: Ranks, of_step: StepBatches, tensors: Mapping[str, torch.Tensor] | None
) -> list[float]:
    """Return the losses of the micro-batches of all ranks, each as :func:`probe` gives it.

    Raises:
        Exception: On every rank, if one of them has an error. Where a forward pass takes all
            ranks and others are held in one that this rank has left, the run ends.
    """
    if ranks.world_size == 1:
        return probe(host, of_step.batches, of_step.num_items, tensors, of_step.count)
    own: list[float] = []
    caught: Exception | None = None
    try:
        own = probe(host, of_step.batches, of_step.num_items, tensors, of_step.count)
    except Exception as error:
        caught = error
    may_be_held = engine_of(host).forwards_together
    ranks.raise_if_any_failed(caught, "Comparing weights", may_be_held=may_be_held)
    return [loss for losses in ranks.gather(own) for loss in losses]


@contextlib.contextmanager
def _modes_kept(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the states of the random number generators back at the end."""
    states = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)
