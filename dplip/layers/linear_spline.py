# SPDX-License-Identifier: Apache-2.0
"""Learned 1-Lipschitz linear splines."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.kernels.linear_spline import linear_spline, locate
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["SPLINE_INITS", "LinearSpline"]

SPLINE_INITS = ("identity", "absolute_value", "relu", "maxmin", "zero")


class LinearSpline(LipschitzLayer):
    r"""``y[b, c, ...] = phi_c(x[b, c, ...])``, one learned linear spline per channel, shared over positions.

    Shapes: ``x`` [B, channels, *], ``coefficients`` [channels, intervals + 1] (values at uniform knots on [-reach, reach]).
    Outside the grid ``phi_c`` is constant (``ends="clamp"``) or continues with slope 1 (``ends="unit"``).

    Guarantee. Lipschitz with constant ``s = max |slope|`` (with unit ends ``max(s, 1)``) in every norm; :meth:`project_`
    clips every slope to [-1, 1]. ``dphi/dcoefficients`` is a convex combination of two unit vectors at any input, so one
    example's gradient is at most ``||g||_2`` for [B, channels] inputs and ``min(||g||_1, sqrt(positions) ||g||_2)`` otherwise.
    Linear extrapolation, which the source uses, has coefficient gradients that grow with the input and is not offered.

    Source: Ducotterd, Goujon, Bohra, Perdios, Neumayer, Unser, Improving Lipschitz-Constrained Neural Networks by
    Learning Activation Functions, JMLR 2024, sections 3.2 and 3.3; TV(2) regularisation from equation 12.

    Args:
        channels: number of splines.
        intervals: number of linear pieces on the grid, any number >= 1.
        reach: half-width of the grid.
        ends: ``"clamp"`` or ``"unit"``.
        init: one of :data:`SPLINE_INITS`; ``"maxmin"`` alternates the absolute value and the identity by channel.

    Raises:
        ConfigError: an argument is out of range.
        ValueError: ``forward`` gets anything but [B, channels, *].
    """

    def __init__(
        self,
        channels: int,
        *,
        intervals: int = 20,
        reach: float = 1.0,
        ends: str = "unit",
        init: str = "identity",
    ) -> None:
        super().__init__()
        if channels < 1 or intervals < 1 or not 0 < reach < math.inf:
            raise ConfigError(
                "LinearSpline: expected channels >= 1, intervals >= 1 and 0 < reach < inf, "
                f"got {channels}, {intervals} and {reach}; fix them"
            )
        if ends not in ("clamp", "unit") or init not in SPLINE_INITS:
            raise ConfigError(
                f"LinearSpline: expected ends 'clamp' or 'unit' and init in {SPLINE_INITS}, "
                f"got {ends!r} and {init!r}; choose among them"
            )
        self.channels, self.intervals, self.reach = channels, intervals, float(reach)
        self.ends, self.init = ends, init
        self.coefficients = nn.Parameter(torch.empty(channels, intervals + 1))
        self.reset_parameters()

    @property
    def step(self) -> float:
        """Distance between neighbouring knots."""
        return 2 * self.reach / self.intervals

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the coefficients to the initial function at the knots."""
        knots = torch.linspace(-self.reach, self.reach, self.intervals + 1, dtype=torch.float64)
        values = {"identity": knots, "absolute_value": knots.abs(), "relu": knots.relu(), "zero": 0 * knots}
        if self.init == "maxmin":
            self.coefficients[0::2] = knots.abs().to(self.coefficients)
            self.coefficients[1::2] = knots.to(self.coefficients)
        else:
            self.coefficients.copy_(values[self.init])

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"LinearSpline: expected x [B, {self.channels}, *], got {tuple(x.shape)}")
        return x.reshape(x.shape[0], self.channels, math.prod(x.shape[2:]))

    def forward(self, x: Tensor) -> Tensor:
        return linear_spline(self._flat(x), self.coefficients, self.reach, self.ends == "unit").reshape(
            x.shape
        )

    def slopes(self) -> Tensor:
        """Slope of every linear piece on the grid: [channels, intervals]."""
        return self.coefficients.diff(dim=1) / self.step

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        slope = float(self.coefficients.detach().double().diff(dim=1).abs().amax()) / self.step
        slope = slope if math.isfinite(slope) else math.inf
        return OperatorNorms.uniform(max(slope, 1.0) if self.ends == "unit" else slope)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        positions = math.prod(shapes.input[1:])
        return {"coefficients": min(g.l1, math.sqrt(positions) * g.l2)}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        index, fraction = locate(self._flat(x), self.reach, self.intervals)
        cotangent = g.reshape(index.shape)
        grad = x.new_zeros(len(x), *self.coefficients.shape)
        grad.scatter_add_(2, index, cotangent * (1 - fraction))
        return {"coefficients": grad.scatter_add_(2, index + 1, cotangent * fraction)}

    @torch.no_grad()
    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Extremes over the box: at its ends or at a knot inside it."""
        at_lower, at_upper = self(lower), self(upper)
        low, high = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
        shape = (1, self.channels) + (1,) * (lower.ndim - 2)
        for k in range(self.intervals + 1):
            knot, value = k * self.step - self.reach, self.coefficients[:, k].view(shape)
            # A hair wider than the box, so that rounding of the knot's position can only add a candidate.
            hair = 1e-12 * (self.reach + abs(knot))
            inside = (lower <= knot + hair) & (knot - hair <= upper)
            low = torch.where(inside, torch.minimum(low, value), low)
            high = torch.where(inside, torch.maximum(high, value), high)
        return low, high

    @torch.no_grad()
    def project_(self) -> None:
        """Clip every slope to [-1, 1] and keep each channel's mean value (source, equation 15)."""
        c = self.coefficients.double()
        rise = c.diff(dim=1).clamp(-self.step, self.step)
        clipped = torch.cat([torch.zeros_like(c[:, :1]), rise.cumsum(1)], dim=1)
        self.coefficients.copy_(clipped + (c - clipped).mean(1, keepdim=True))

    def tv2(self) -> Tensor:
        """Second-order total variation ``sum |change of slope|`` over all channels, a scalar penalty for few pieces."""
        return self.slopes().diff(dim=1).abs().sum()

    def linear_regions(self, tolerance: float = 1e-3) -> Tensor:
        """Number of distinct linear pieces on the grid, per channel [channels]."""
        return (self.slopes().detach().diff(dim=1).abs() > tolerance).sum(1) + 1

    def fan_in(self, shapes: Shapes) -> int:
        return 8

    def extra_repr(self) -> str:
        return f"{self.channels}, intervals={self.intervals}, reach={self.reach:g}, ends={self.ends!r}"
