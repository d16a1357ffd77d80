# SPDX-License-Identifier: Apache-2.0
"""Linear splines on a uniform grid: ``y[b, c, s] = phi_c(x[b, c, s])``.

``phi_c`` interpolates ``coefficients[c, 0..K]`` at ``K + 1`` knots from ``-reach`` to ``reach``, and continues
outside with fixed slopes ``end_slopes[c]`` (left, right), or constantly where they are None. So the gradient with
respect to the coefficients is a convex combination of two unit vectors at every input, however far away. Exactly one
of grid and end counts for the derivative in ``x``, at and within rounding of ``+-reach`` too: two slopes are never
added there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dplip.kernels.dispatch import register, select

__all__ = ["linear_spline", "linear_spline_reference", "locate"]


def locate(x: Tensor, reach: float, intervals: int) -> tuple[Tensor, Tensor]:
    """Interval index (int64, in ``0..K-1``) and fraction (in [0, 1]) of every input.

    The index is clamped after rounding, so neither an input outside the grid nor a rounding error at a knot
    can ever read a neighbouring channel's coefficients. The fraction's derivative in ``x`` is that of a point of the
    grid wherever ``|x| <= reach``, and 0 beyond.
    """
    t = (x.clamp(-reach, reach) + reach) * (intervals / (2 * reach))
    index = t.detach().floor().nan_to_num(0).clamp(0, intervals - 1)
    fraction = t - index  # NaN stays
    return index.long(), fraction + (fraction.clamp(0, 1) - fraction).detach()


@register("linear_spline", "reference")
def linear_spline_reference(x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> Tensor:
    """Truth and CPU path; differentiable by autograd in ``x`` and ``coefficients``."""
    channels, knots = coefficients.shape
    index, fraction = locate(x, reach, knots - 1)
    offset = (torch.arange(channels, device=x.device) * knots).view(1, channels, 1)
    flat, at = coefficients.reshape(-1), (index + offset).reshape(-1)
    left, right = flat[at].view_as(x), flat[at + 1].view_as(x)
    y = left + (right - left) * fraction
    if end_slopes is None:
        return y
    low, high = end_slopes[:, :1], end_slopes[:, 1:]
    below, above = low * (-reach - x).relu(), high * (x - reach).relu()
    # A slope of 0 times an infinite distance is 0.
    return y + torch.where(high == 0, 0, above) - torch.where(low == 0, 0, below)


def linear_spline(x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> Tensor:
    """``x`` [B, C, S], ``coefficients`` [C, K + 1], ``end_slopes`` [C, 2] or None -> [B, C, S].

    Raises:
        ValueError: shapes or dtypes do not fit, fewer than two knots, or ``reach`` is not positive.
    """
    if x.ndim != 3 or coefficients.ndim != 2 or x.shape[1] != coefficients.shape[0]:
        raise ValueError(
            "linear_spline: expected x [B, C, S] and coefficients [C, K + 1], "
            f"got {tuple(x.shape)} and {tuple(coefficients.shape)}"
        )
    if coefficients.shape[1] < 2 or not reach > 0 or x.dtype != coefficients.dtype:
        raise ValueError(
            "linear_spline: expected two or more knots, reach > 0 and one dtype, "
            f"got {coefficients.shape[1]}, {reach}, {x.dtype} and {coefficients.dtype}"
        )
    if end_slopes is not None and (end_slopes.shape != (len(coefficients), 2) or end_slopes.dtype != x.dtype):
        raise ValueError(
            f"linear_spline: expected end_slopes [{len(coefficients)}, 2] of {x.dtype}, "
            f"got {tuple(end_slopes.shape)} of {end_slopes.dtype}"
        )
    y: Tensor = select("linear_spline", x.device.type)(x, coefficients, reach, end_slopes)
    return y
