# SPDX-License-Identifier: Apache-2.0
"""Two ways to put the values of a linear spline back where neighbours differ by at most one step.

Both act on every row of ``values`` [C, K + 1] by itself and return the same shape; both are idempotent and keep the
mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["clip_slopes", "nearest_slopes"]

Array = np.ndarray[Any, np.dtype[np.float64]]


def clip_slopes(values: Tensor, step: float) -> Tensor:
    """Clips every difference to [-step, step] and restores each row's mean; O(K), but neither nearest nor
    non-expansive.

    Source: Ducotterd, Goujon, Bohra, Perdios, Neumayer, Unser, JMLR 2024, equation 15.
    """
    rise = values.diff(dim=1).clamp(-step, step)
    clipped = torch.cat([torch.zeros_like(values[:, :1]), rise.cumsum(1)], dim=1)
    return clipped + (values - clipped).mean(1, keepdim=True)


def nearest_slopes(values: Tensor, step: float) -> Tensor:
    """The Euclidean projection: ``argmin ||v - values||_2`` with ``|v_{k+1} - v_k| <= step``, exactly, in O(K^2) per
    row.

    Dynamic programming. ``f_k(v) = (v - c_k)^2 / 2 + min_{|w - v| <= step} f_{k-1}(w)`` is convex; its derivative is
    piecewise linear and is kept as breakpoints. Minimising over the window moves the part left of the minimiser ``m``
    by ``-step``, the part right of it by ``+step`` and puts a zero between; then ``v - c_k`` is added. Back from
    ``v_K = m_K``, ``v_{k-1}`` is ``m_{k-1}`` clipped to the window around ``v_k``. (The method of N. A. Johnson, A
    Dynamic Programming Algorithm for the Fused Lasso and L0-Segmentation, JCGS 2013, for constrained differences.)

    Runs on the CPU, in float64: hundreds of tiny operations in a row are slower on a GPU. Rows that obey the constraint
    are returned as they are.
    """
    result = values.detach().clone()
    violating = (result.diff(dim=1).abs() > step).any(dim=1)
    if bool(violating.any()):
        result[violating] = torch.from_numpy(_nearest(result[violating].double().cpu().numpy(), step)).to(result)
    return result


def _nearest(c: Array, step: float) -> Array:
    rows, knots = c.shape
    m = c[:, :1]
    places, slopes = np.empty((rows, 0)), np.empty((rows, 0))  # breakpoints of f_k' in ascending order, and f_k' there
    minimisers = [m]
    for k in range(1, knots):
        left = slopes < 0
        count = left.sum(1, keepdims=True)
        low, high = np.repeat(m - step, 2 * k, axis=1), np.repeat(m + step, 2 * k, axis=1)
        low[:, :-2] = np.where(left, places - step, low[:, :-2])
        high[:, 2:] = np.where(left, high[:, 2:], places + step)
        places = np.where(np.arange(2 * k) <= count, low, high)
        bent = np.zeros((rows, 2 * k))
        bent[:, :-2] += np.where(left, slopes, 0)
        bent[:, 2:] += np.where(left, 0, slopes)
        slopes = bent + places - c[:, k : k + 1]
        m = _root(places, slopes, k + 1)
        minimisers.append(m)
    found = [m]
    for m in reversed(minimisers[:-1]):
        found.append(np.clip(m, found[-1] - step, found[-1] + step))
    return np.concatenate(found[::-1], axis=1)


def _root(places: Array, slopes: Array, outer: int) -> Array:
    """Where the increasing function through ``(places, slopes)``, of derivative ``outer`` beyond them, is 0: [C, 1]."""
    rows, last = np.arange(len(places)), places.shape[1] - 1
    right = (slopes < 0).sum(1)
    a, b = np.maximum(right - 1, 0), np.minimum(right, last)
    low, high, at_low, at_high = places[rows, a], places[rows, b], slopes[rows, a], slopes[rows, b]
    inside = (right > 0) & (right <= last)
    rise = np.where(inside, at_high - at_low, 1.0)
    root: Array = np.where(inside, low - at_low / rise * (high - low), low - at_low / outer)
    return root[:, None]
