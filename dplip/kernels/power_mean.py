# SPDX-License-Identifier: Apache-2.0
"""Power-mean distance: ``y[b, o] = (mean_i |x_bi - w_oi|^p)^(1/p) = I^(-1/p) ||x_b - w_o||_p``, p >= 2.

The row of the Jacobian is ``r = I^(-1/p) sign(t) (|t| / ||t||_p)^(p-1)`` with ``t = x - w``; its l_1 norm is
at most 1 for every p, which is why this normalisation, not the plain l_p distance, is trained with.
Values are normalised by the largest entry first, so p = 1000 neither over- nor underflows, and ``t = 0``
has the subgradient 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dplip.kernels.dispatch import register, select
from dplip.kernels.distance import blocks, check_operands

__all__ = ["power_mean", "power_mean_interval", "power_mean_reference", "power_mean_rows"]


def _mean_power(magnitude: Tensor, p: float) -> Tensor:
    """``(mean |t|^p)^(1/p)`` over the last axis for non-negative input."""
    largest = magnitude.amax(-1, keepdim=True)
    ratio = magnitude / torch.where(largest > 0, largest, 1)
    return largest.squeeze(-1) * ratio.pow_(p).mean(-1).pow_(1 / p)


def power_mean_rows(t: Tensor, y: Tensor, p: float) -> Tensor:
    """Jacobian rows ``dy/dx`` [..., I] from differences ``t`` [..., I] and values ``y`` [...]."""
    d = t.shape[-1]
    norm = (y * d ** (1 / p)).unsqueeze(-1)
    ratio = (t.abs() / torch.where(norm > 0, norm, 1)).clamp_max_(1)
    return ratio.pow_(p - 1).mul_(d ** (-1 / p)).mul_(t.sign())


@register("power_mean", "reference")
def power_mean_reference(x: Tensor, w: Tensor, p: float) -> Tensor:
    """Values [B, O]."""
    y = x.new_empty(x.shape[0], w.shape[0])
    for rows, t in blocks(x, w):
        y[rows] = _mean_power(t.abs_(), p)
    return y


def power_mean_interval(lower: Tensor, upper: Tensor, w: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Exact range of every neuron over the box ``lower <= x <= upper`` (monotone in every ``|x_i - w_i|``)."""
    check_operands("power_mean_interval", lower, w)
    check_operands("power_mean_interval", upper, w)
    low, high = lower.new_empty(lower.shape[0], w.shape[0]), upper.new_empty(upper.shape[0], w.shape[0])
    for (rows, below), (_, above) in zip(blocks(lower, w), blocks(upper, w), strict=True):
        low[rows] = _mean_power(torch.maximum(below, -above).clamp_min_(0), p)
        high[rows] = _mean_power(torch.maximum(below.abs_(), above.abs_()), p)
    return low, high


class _PowerMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, p: float) -> Tensor:
        y: Tensor = select("power_mean", x.device.type)(x, w, p)
        ctx.save_for_backward(x, w, y)
        ctx.p = p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, y = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        dx, dw = torch.zeros_like(x) if need_x else None, torch.zeros_like(w) if need_w else None
        for rows, t in blocks(x, w):
            s = power_mean_rows(t, y[rows], ctx.p).mul_(dy[rows].unsqueeze(-1))
            if dx is not None:
                dx[rows] = s.sum(1)
            if dw is not None:
                dw -= s.sum(0)
        return dx, dw, None


def power_mean(x: Tensor, w: Tensor, p: float) -> Tensor:
    """``x`` [B, I], ``w`` [O, I] -> [B, O] for finite ``p >= 2``. Differentiable in x and w.

    Raises:
        ValueError: operands do not fit, or ``p`` is below 2 or not finite.
    """
    check_operands("power_mean", x, w)
    if not 2 <= p < float("inf"):
        raise ValueError(f"power_mean: expected 2 <= p < inf, got {p}; p = inf is order_statistic")
    y: Tensor = _PowerMean.apply(x, w, p)
    return y
