# SPDX-License-Identifier: Apache-2.0
r"""How much a linear function can grow on the intersection of a ball and a box.

For every ``lambda >= 0``, weak duality gives

    max { c.d : ||d||_2 <= r, l <= d <= u }  <=  lambda r^2 + sum_k max_{l_k <= d_k <= u_k} (c_k d_k - lambda d_k^2),

where the inner maxima are at ``clip(c_k / (2 lambda), l_k, u_k)``. Any ``lambda`` is sound; the dual is convex, and
where the intersection has an inner point its minimum is the maximum on the left. A bisection finds it.

Source: Boyd, Vandenberghe, Convex Optimization, 2004, sections 5.1 and 5.2; the problem: Huang, Zhang, Shi, Kolter,
Anandkumar, NeurIPS 2021, appendix on the last layer (solved there by clipping, without a dual).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ball_box_bound", "dual"]

_BISECTIONS = 40


def dual(c: Tensor, radius: Tensor, lower: Tensor, upper: Tensor, multiplier: Tensor) -> Tensor:
    """The right-hand side [...] at ``multiplier`` [...]; ``c``, ``lower`` and ``upper`` are [..., K]."""
    d = _inner(c, lower, upper, multiplier)
    terms = c * d - multiplier.unsqueeze(-1) * d.square()
    size = (c * d).abs().sum(-1) + multiplier * (d.square().sum(-1) + radius.square())
    rounding = 4 * (c.shape[-1] + 8) * torch.finfo(c.dtype).eps * size
    return multiplier * radius.square() + terms.sum(-1) + rounding


def _inner(c: Tensor, lower: Tensor, upper: Tensor, multiplier: Tensor) -> Tensor:
    m = multiplier.unsqueeze(-1)
    free = torch.where(m > 0, c / (2 * torch.where(m > 0, m, 1.0)), torch.sign(c) * torch.inf)
    free = torch.where(c == 0, 0.0, free)
    return torch.minimum(torch.maximum(free, lower), upper)


@torch.no_grad()
def _best_multiplier(c: Tensor, radius: Tensor, lower: Tensor, upper: Tensor, bisections: int) -> Tensor:
    # Here the free maximiser has length radius, and clipping to a box around 0 shortens.
    high = torch.linalg.vector_norm(c, dim=-1) / (2 * radius)
    low = torch.zeros_like(high)
    for _ in range(bisections):
        middle = (low + high) / 2
        long = _inner(c, lower, upper, middle).square().sum(-1) > radius.square()
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    return torch.where(torch.isfinite(high), high, 0.0)


def ball_box_bound(c: Tensor, radius: Tensor, lower: Tensor, upper: Tensor, bisections: int = _BISECTIONS) -> Tensor:
    """An upper bound [...] on ``c . d`` over ``||d||_2 <= radius`` and ``lower <= d <= upper``, rounded up.

    Never more than the ball's ``radius ||c||_2``, the box's bound, or the dual wherever the bisection ends. Infinite
    sides of the box are allowed. NaN where an input is NaN: compare so that NaN proves nothing.

    Differentiable: the multiplier is held fixed, which at the optimum is the derivative of the minimum (Danskin), and
    anywhere that of a sound bound.
    """
    slack = 1 + 8 * (c.shape[-1] + 8) * torch.finfo(c.dtype).eps
    length = torch.linalg.vector_norm(c, dim=-1)
    ball = torch.where(length == 0, 0.0 * radius, length * radius * slack)
    ends = torch.where(c == 0, 0.0, torch.maximum(c * lower, c * upper))
    box = ends.sum(-1) + 4 * c.shape[-1] * torch.finfo(c.dtype).eps * ends.abs().sum(-1)
    multiplier = _best_multiplier(c, radius, lower, upper, bisections)
    best = dual(c, radius, lower, upper, multiplier)
    best = torch.where(torch.isfinite(best), best, torch.inf)
    broken = torch.isnan(c).any(-1) | torch.isnan(lower).any(-1) | torch.isnan(upper).any(-1) | torch.isnan(radius)
    bound = torch.fmin(torch.fmin(ball, box), best)
    return torch.where(broken, torch.nan, bound)
