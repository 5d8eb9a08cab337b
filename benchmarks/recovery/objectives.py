"""Losses of healthy runs that are not a plain cross entropy: around zero, negative, rising, huge or tiny.

Each takes the logits, the labels, the step and the logits of the untrained model, and returns the loss. It is the
same in training and in evaluation mode, as a real objective is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import TrainerCallback

from benchmarks.recovery.data import IGNORED

Tensor = torch.Tensor


def token_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probability of each label, and where there is one; causal models predict the next token."""
    if logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    else:
        logits, labels = logits[:, None], labels[:, None]
    known = labels != IGNORED
    chosen = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen, known


def _mean(values: Tensor, known: Tensor) -> Tensor:
    return (values * known).sum() / known.sum()


def _advantages(labels: Tensor) -> Tensor:
    """Rewards that a policy can raise, normalized over the batch as in GRPO."""
    rewards = (labels.reshape(len(labels), -1) % 5 == 0).float().mean(1)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def grpo(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """A policy gradient whose value is 0, plus the distance to the untrained model, which rises from 0."""
    logps, known = token_logps(logits, labels)
    reference, _ = token_logps(before, labels)
    ratio = (logps - logps.detach()).exp()
    distance = (reference - logps).exp() - (reference - logps) - 1.0
    return _mean(-_advantages(labels)[:, None] * ratio + 0.04 * distance, known)


def reinforce(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """Log probabilities times advantages: a loss around 0, of any sign."""
    logps, known = token_logps(logits, labels)
    return _mean(-_advantages(labels)[:, None] * logps, known) - 0.1 * _mean(logps, known)


def expected_accuracy(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """Minus the probability of the right label: negative from the first step on."""
    logps, known = token_logps(logits, labels)
    return -_mean(logps.exp(), known)


def entropy_bonus(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """Cross entropy less a bonus for entropy: it crosses zero and may rise."""
    logps, known = token_logps(logits, labels)
    spread = logits.float().log_softmax(-1)
    entropy = -(spread.exp() * spread).sum(-1).mean()
    return -_mean(logps, known) - 1.2 * entropy


def falling_reward(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """A penalty whose weight grows: the loss rises through the whole run while the model learns."""
    logps, known = token_logps(logits, labels)
    reference, _ = token_logps(before, labels)
    return -_mean(logps, known) * 0.3 + 0.004 * step * _mean((logps - reference).abs(), known)


def dpo(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """A preference loss between the rows of a batch: it begins at log 2."""
    logps, known = token_logps(logits, labels)
    reference, _ = token_logps(before, labels)
    gains = ((logps - reference) * known).sum(1)
    better, worse = gains.chunk(2)
    good = (labels.reshape(len(labels), -1).float().mean(1)).chunk(2)
    sign = torch.where(good[0] >= good[1], 1.0, -1.0)
    return -logsigmoid(0.1 * sign * (better - worse)).mean()


def summed(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """The sum over the batch instead of the mean: a loss of some thousands."""
    logps, known = token_logps(logits, labels)
    return -(logps * known).sum() * 10.0


def tiny(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """A loss of a hundred thousandth of the usual."""
    logps, known = token_logps(logits, labels)
    return -_mean(logps, known) * 1e-5


def outliers(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """A regression with heavy-tailed targets: some batches have many times the usual loss."""
    wild = torch.Generator().manual_seed(step)
    noise = torch.randn(len(labels), generator=wild) / torch.rand(len(labels), generator=wild).clamp(min=0.03)
    targets = labels.reshape(len(labels), -1)[:, 0].float() / 5.0 + 0.3 * noise
    return (logits.reshape(len(labels), -1)[:, 0] - targets).pow(2).mean()


def oscillating(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """A loss whose weight goes up and down, as of a model that trains against another one."""
    logps, known = token_logps(logits, labels)
    return -_mean(logps, known) * (1.0 + 0.5 * math.sin(step / 6.0))


def smoothed(logits: Tensor, labels: Tensor, step: int, before: Tensor) -> Tensor:
    """Cross entropy with label smoothing, and a second loss that becomes part of it from the middle on."""
    if logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    loss = cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, label_smoothing=0.1)
    return loss + (0.05 * flat.logsumexp(-1).pow(2).mean() if step > 120 else 0.0)


class ObjectiveCallback(TrainerCallback):
    """Replaces the loss that a model returns, in training and in evaluation mode.

    Args:
        objective: One of this module.
        model: The model; its present weights are the reference.
    """

    def __init__(self, objective: Callable[[Tensor, Tensor, int, Tensor], Tensor], model: Any) -> None:
        self.objective, self.step = objective, 1
        self.before = copy.deepcopy(model).eval().requires_grad_(False)
        self.handle = model.register_forward_hook(self._replace, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step."""
        self.step = state.global_step + 1

    def _replace(self, model: Any, inputs: Any, named: dict[str, Any], output: Any) -> Any:
        labels = named.get("labels")
        if labels is None:
            return output
        names = [name for name in ("input_ids", "pixel_values") if name in named]
        with torch.no_grad():
            before = self.before(**{name: named[name] for name in names}).logits
        output["loss"] = self.objective(output["logits"], labels, self.step, before)
        return output
