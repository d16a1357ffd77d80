# SPDX-License-Identifier: Apache-2.0
"""Linear splines on a uniform grid: ``y[b, c, s] = phi_c(x[b, c, s])``.

``phi_c`` interpolates ``coefficients[c, 0..K]`` at ``K + 1`` knots from ``-reach`` to ``reach``. Outside the grid
it is constant (``unit_slope=False``) or continues with slope 1 (``unit_slope=True``), so the gradient with respect to
the coefficients is a convex combination of two unit vectors at every input, however far away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dplip.kernels.dispatch import register, select

__all__ = ["linear_spline", "linear_spline_reference", "locate"]


def locate(x: Tensor, reach: float, intervals: int) -> tuple[Tensor, Tensor]:
    """Interval index (int64, in ``0..K-1``) and fraction (in [0, 1]) of every input.

    The index is clamped after rounding, so neither an input outside the grid nor a rounding error at a knot
    can ever read a neighbouring channel's coefficients.
    """
    t = (x + reach) * (intervals / (2 * reach))
    index = t.detach().floor().nan_to_num(0).clamp(0, intervals - 1)
    return index.long(), (t - index).clamp(0, 1)  # NaN stays in the fraction


@register("linear_spline", "reference")
def linear_spline_reference(x: Tensor, coefficients: Tensor, reach: float, unit_slope: bool) -> Tensor:
    """Truth and CPU path; differentiable by autograd in ``x`` and ``coefficients``."""
    channels, knots = coefficients.shape
    index, fraction = locate(x, reach, knots - 1)
    offset = (torch.arange(channels, device=x.device) * knots).view(1, channels, 1)
    flat, at = coefficients.reshape(-1), (index + offset).reshape(-1)
    left, right = flat[at].view_as(x), flat[at + 1].view_as(x)
    y = left + (right - left) * fraction
    return y + (x - x.clamp(-reach, reach)) if unit_slope else y


def linear_spline(x: Tensor, coefficients: Tensor, reach: float, unit_slope: bool) -> Tensor:
    """``x`` [B, C, S], ``coefficients`` [C, K + 1] -> [B, C, S].

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
    y: Tensor = select("linear_spline", x.device.type)(x, coefficients, reach, unit_slope)
    return y
