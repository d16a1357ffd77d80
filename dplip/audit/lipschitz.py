# SPDX-License-Identifier: Apache-2.0
"""Attempts to refute a Lipschitz constant: pairs of inputs whose logit differences part faster than it allows."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from dplip.audit.ascent import ascend
from dplip.errors import ConfigError

__all__ = ["lipschitz_lower_bound"]

_NORMS = ("linf", "l2")


def lipschitz_lower_bound(
    model: nn.Module,
    shape: tuple[int, ...],
    norm: str = "linf",
    *,
    restarts: int = 8,
    steps: int = 60,
    scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """For each pair of classes, the largest ``|d(z_i - z_j)| / ||x - x'||`` found: [C, C] float64.

    Adam on ``x`` and ``x'`` of a float64 copy; starts at random points of size ``scale``, with steepest moves of
    several sizes. Every entry is a lower bound on the true constant, up to the rounding of one quotient.

    Args:
        model: returns logits [B, C]; left as it was.
        shape: of one example.
        norm: of the input, ``"linf"`` or ``"l2"``.
        restarts, steps: starts per pair, and ascent steps.
        scale: size of the inputs at which the search starts.
        seed: of the starts.

    Raises:
        ConfigError: ``norm`` is unknown.
    """
    if norm not in _NORMS:
        raise ConfigError(f"lipschitz_lower_bound: expected norm in {_NORMS}, got {norm!r}; choose one of them")
    twin = copy.deepcopy(model).double().requires_grad_(False)
    device = next((t.device for t in (*twin.parameters(), *twin.buffers())), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        classes = twin(torch.zeros(1, *shape, dtype=torch.float64, device=device)).shape[1]
    i, j = torch.triu_indices(classes, classes, 1, device=device).repeat_interleave(restarts, 1)
    x = (scale * torch.randn(len(i), *shape, generator=generator, dtype=torch.float64)).to(device)
    sizes = scale * 10.0 ** -(3 * torch.rand(len(i), generator=generator, dtype=torch.float64)).to(device)
    at = torch.arange(len(i), device=device)

    def difference(point: Tensor) -> Tensor:
        logits: Tensor = twin(point)
        return logits[at, i] - logits[at, j]

    x.requires_grad_()
    with torch.enable_grad():
        slope = torch.autograd.grad(difference(x).sum(), x, materialize_grads=True, allow_unused=True)[0]
    steepest = slope.sign() if norm == "linf" else slope / _size(slope, 2.0).clamp_min(1e-300)
    blind = (steepest.flatten(1) == 0).all(1).view(_size(slope, 2.0).shape)
    steepest = torch.where(blind, torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device), steepest)
    move = (steepest * sizes.view(blind.shape)).requires_grad_()
    best = torch.zeros(len(i), dtype=torch.float64, device=device)

    def ratio() -> Tensor:
        # The move that is really made: x + move is rounded.
        made = (x + move) - x
        length = _size(made, math.inf if norm == "linf" else 2.0).flatten()
        return (difference(x + move) - difference(x)).abs() / length.clamp_min(1e-6 * scale)

    @torch.no_grad()
    def observe() -> None:
        torch.maximum(best, ratio().nan_to_num(0.0, 0.0, 0.0), out=best)

    with torch.enable_grad():
        ascend(ratio, [x, move], steps=steps, lr=0.03 * scale, observe=observe)
    found = torch.zeros(classes * classes, dtype=torch.float64, device=device)
    found = found.scatter_reduce(0, i * classes + j, best, "amax").view(classes, classes)
    return found + found.T


def _size(v: Tensor, order: float) -> Tensor:
    """The norm of every example, shaped to broadcast against ``v``."""
    size: Tensor = torch.linalg.vector_norm(v.flatten(1), order, dim=1)
    return size.view(-1, *[1] * (v.ndim - 1))
