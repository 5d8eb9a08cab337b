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
    norms = [_norm(weight.grad.detach()) for weight in model.parameters() if weight.grad is not None]
    return (
        torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])) if norms else None
    )


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    is_half = values.dtype in (torch.float16, torch.bfloat16)
    return torch.linalg.vector_norm(values, dtype=torch.float32 if is_half else None).float()
