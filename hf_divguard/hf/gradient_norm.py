"""How large the gradients are, where the host does not measure it."""

from __future__ import annotations

import torch

__all__ = ["gradient_norm"]


def gradient_norm(model: torch.nn.Module) -> torch.Tensor | None:
    """Return the norm of all gradients of ``model`` together; ``None`` if it has none.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> layer.weight.grad, layer.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
        >>> gradient_norm(layer)
        tensor(5.)
    """
    norms = [
        torch.linalg.vector_norm(weight.grad.detach(), dtype=torch.float32)
        for weight in model.parameters()
        if weight.grad is not None
    ]
    return (
        torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])) if norms else None
    )
