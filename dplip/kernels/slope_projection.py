# SPDX-License-Identifier: Apache-2.0
"""Two ways to put the values of a linear spline back where neighbours differ by at most one step.

Both act on every row of ``values`` [C, K + 1] by itself and return the same shape; both are idempotent and keep the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["clip_slopes", "nearest_slopes"]


def clip_slopes(values: Tensor, step: float) -> Tensor:
    """Clips every difference to [-step, step] and restores each row's mean; O(K), but neither nearest nor non-expansive.

    Source: Ducotterd, Goujon, Bohra, Perdios, Neumayer, Unser, JMLR 2024, equation 15.
    """
    rise = values.diff(dim=1).clamp(-step, step)
    clipped = torch.cat([torch.zeros_like(values[:, :1]), rise.cumsum(1)], dim=1)
    return clipped + (values - clipped).mean(1, keepdim=True)


def nearest_slopes(values: Tensor, step: float) -> Tensor:
    """The Euclidean projection: ``argmin ||v - values||_2`` with ``|v_{k+1} - v_k| <= step``, exactly, in O(K^2) per row.

    Dynamic programming. ``f_k(v) = (v - c_k)^2 / 2 + min_{|w - v| <= step} f_{k-1}(w)`` is convex; its derivative is
    piecewise linear and is kept as breakpoints. Minimising over the window moves the part left of the minimiser ``m`` by
    ``-step``, the part right of it by ``+step`` and puts a zero between; then ``v - c_k`` is added. Back from
    ``v_K = m_K``, ``v_{k-1}`` is ``m_{k-1}`` clipped to the window around ``v_k``. (The method of N. A. Johnson, A
    Dynamic Programming Algorithm for the Fused Lasso and L0-Segmentation, JCGS 2013, for constrained differences.)
    """
    c = values
    places, slopes = c[:, :0], c[:, :0]  # breakpoints of f_k' in ascending order, and f_k' there
    minimisers = [c[:, 0]]
    for k in range(1, c.shape[1]):
        m = minimisers[-1][:, None]
        moved = torch.where(slopes < 0, places - step, places + step)
        places, order = torch.cat([moved, m - step, m + step], dim=1).sort(dim=1, stable=True)
        slopes = torch.cat([slopes, torch.zeros_like(m), torch.zeros_like(m)], dim=1).gather(1, order)
        slopes = (slopes + places - c[:, k : k + 1]).cummax(dim=1).values  # rounding may not undo the order
        minimisers.append(_root(places, slopes, k + 1))
    found = [minimisers[-1]]
    for m in reversed(minimisers[:-1]):
        found.append(torch.minimum(torch.maximum(m, found[-1] - step), found[-1] + step))
    return torch.stack(found[::-1], dim=1)


def _root(places: Tensor, slopes: Tensor, outer: int) -> Tensor:
    """Where the increasing function through ``(places, slopes)``, of derivative ``outer`` beyond them, is 0."""
    rows, count = torch.arange(len(places), device=places.device), places.shape[1]
    right = (slopes < 0).sum(1)
    a, b = (right - 1).clamp_min(0), right.clamp_max(count - 1)
    low, high, at_low, at_high = places[rows, a], places[rows, b], slopes[rows, a], slopes[rows, b]
    share = (-at_low / (at_high - at_low)).clamp(0, 1).nan_to_num(0)
    between = low + share * (high - low)
    outside = torch.where(right == 0, low, high) - torch.where(right == 0, at_low, at_high) / outer
    return torch.where((right == 0) | (right == count), outside, between)
