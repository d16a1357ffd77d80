# SPDX-License-Identifier: Apache-2.0
"""Learned 1-Lipschitz linear splines."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.kernels.linear_spline import linear_spline, linear_spline_coefficient_grad, locate
from dplip.kernels.slope_projection import clip_slopes, nearest_slopes
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["SPLINE_ENDS", "SPLINE_INITS", "SPLINE_PROJECTIONS", "LinearSpline"]

SPLINE_INITS = ("identity", "absolute_value", "relu", "maxmin", "zero")
SPLINE_ENDS = ("clamp", "unit", "match")
SPLINE_PROJECTIONS = {"clip": clip_slopes, "nearest": nearest_slopes}

_END_SLOPES = {"identity": (1.0, 1.0), "absolute_value": (-1.0, 1.0), "relu": (0.0, 1.0), "zero": (0.0, 0.0)}


class LinearSpline(LipschitzLayer):
    r"""``y[b, c, ...] = phi_c(x[b, c, ...])``, one learned linear spline per channel, shared over positions; with
    ``scaled``, ``y = phi_c(a_c x) / a_c``.

    Shapes: ``x`` [B, channels, *], ``coefficients`` [channels, intervals + 1] (values at uniform knots on
    [-reach, reach]), ``scale`` ``a`` [channels]. Outside the grid ``phi_c`` is constant (``ends="clamp"``), has slope 1
    (``"unit"``), or keeps the end slopes of the initial function (``"match"``), so that |x| starts as |x| everywhere.

    Guarantee. Lipschitz with constant ``s = max |slope|``, the ends included, in every norm; :meth:`project_` puts
    every slope into [-1, 1]. ``dphi/dcoefficients`` is a convex combination of two unit vectors at any input, so one
    example's gradient is at most ``||g||_2`` for [B, channels] inputs and ``min(||g||_1, sqrt(positions) ||g||_2)``
    otherwise, times ``1 / min a`` if scaled. ``dy/da = (u phi'(u) - phi(u)) / a^2`` with ``u = a x`` is minus the
    intercept at 0 of the piece that ``u`` lies on, over ``a^2``: bounded for *any* input by the largest intercept, and
    computed as that intercept, so that no rounding error of the size of ``x`` is released. Linear extrapolation, which
    the source uses, has coefficient gradients that grow with the input and is not offered.

    Source: Ducotterd, Goujon, Bohra, Perdios, Neumayer, Unser, Improving Lipschitz-Constrained Neural Networks by
    Learning Activation Functions, JMLR 2024, sections 3.2 and 3.3; TV(2) regularisation from equation 12.

    Args:
        channels: number of splines.
        intervals: number of linear pieces on the grid, any number >= 1.
        reach: half-width of the grid.
        ends: one of :data:`SPLINE_ENDS`.
        init: one of :data:`SPLINE_INITS`; ``"maxmin"`` alternates the absolute value and the identity by channel. A
            corner at 0 is exact for an even number of intervals and cut off half an interval around 0 for an odd one.
        scaled: learn ``a``, starting at 1.
        scale_range: where :meth:`project_` keeps ``a``; beyond it ``forward`` uses the nearest end.
        projection: ``"clip"`` (the source's) or ``"nearest"`` (Euclidean, so non-expansive), see
            :mod:`dplip.kernels.slope_projection`.

    Raises:
        ConfigError: an argument is out of range.
        ValueError: ``forward`` gets anything but [B, channels, *].
    """

    end_slopes: Tensor | None

    def __init__(
        self,
        channels: int,
        *,
        intervals: int = 20,
        reach: float = 1.0,
        ends: str = "unit",
        init: str = "identity",
        scaled: bool = False,
        scale_range: tuple[float, float] = (0.25, 4.0),
        projection: str = "clip",
    ) -> None:
        super().__init__()
        if channels < 1 or intervals < 1 or not 0 < reach < math.inf:
            raise ConfigError(
                "LinearSpline: expected channels >= 1, intervals >= 1 and 0 < reach < inf, "
                f"got {channels}, {intervals} and {reach}; fix them"
            )
        if ends not in SPLINE_ENDS or init not in SPLINE_INITS or projection not in SPLINE_PROJECTIONS:
            raise ConfigError(
                f"LinearSpline: expected ends in {SPLINE_ENDS}, init in {SPLINE_INITS} and projection in "
                f"{tuple(SPLINE_PROJECTIONS)}, got {ends!r}, {init!r} and {projection!r}; choose among them"
            )
        if not 0 < scale_range[0] <= 1 <= scale_range[1] < math.inf:
            raise ConfigError(
                f"LinearSpline: expected 0 < low <= 1 <= high < inf, got scale_range {scale_range}; fix it"
            )
        self.channels, self.intervals, self.reach = channels, intervals, float(reach)
        self.ends, self.init, self.projection = ends, init, projection
        self.scale_range = (float(scale_range[0]), float(scale_range[1]))
        self.coefficients = nn.Parameter(torch.empty(channels, intervals + 1))
        self.scale = nn.Parameter(torch.ones(channels)) if scaled else None
        self.register_buffer("end_slopes", None if ends == "clamp" else torch.ones(channels, 2))
        self.reset_parameters()

    @property
    def step(self) -> float:
        """Distance between neighbouring knots."""
        return 2 * self.reach / self.intervals

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set coefficients and matched end slopes to those of the initial function, and the scale to 1."""
        knots = torch.linspace(-self.reach, self.reach, self.intervals + 1, dtype=torch.float64)
        values = {"identity": knots, "absolute_value": knots.abs(), "relu": knots.relu(), "zero": 0 * knots}
        for parity in (0, 1):
            init = self.init if self.init != "maxmin" else ("absolute_value", "identity")[parity]
            self.coefficients[parity::2] = values[init].to(self.coefficients)
            if self.end_slopes is not None and self.ends == "match":
                self.end_slopes[parity::2] = self.end_slopes.new_tensor(_END_SLOPES[init])
        if self.scale is not None:
            self.scale.fill_(1)

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"LinearSpline: expected x [B, {self.channels}, *], got {tuple(x.shape)}")
        return x.reshape(x.shape[0], self.channels, math.prod(x.shape[2:]))

    def _factor(self) -> Tensor | None:
        return None if self.scale is None else self.scale.clamp(*self.scale_range)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        flat, a = self._flat(x), self._factor()
        if a is None:
            return linear_spline(flat, self.coefficients, self.reach, self.end_slopes).reshape(x.shape)
        fixed = a.detach()
        y = linear_spline(fixed * flat, self.coefficients, self.reach, self.end_slopes) / fixed
        # The derivative in the scale is put in as the intercept it is: x phi' - phi / a would leave rounding errors of
        # the size of x, which the noise of an intercept near 0 would not hide.
        if torch.is_grad_enabled() and a.requires_grad:
            y = y - (a - fixed) * self._intercepts(fixed * flat.detach()) / fixed**2
        return y.reshape(x.shape)

    @torch.no_grad()
    def _intercept_table(self) -> Tensor:
        """Value at 0 of the line through each piece: left end, grid, right end; [channels, intervals + 2]."""
        c, k = self.coefficients, torch.arange(self.intervals, device=self.coefficients.device) - self.intervals / 2
        grid = c[:, :-1] * (1 + k) - c[:, 1:] * k
        ends = c[:, [0, -1]]
        if self.end_slopes is not None:
            ends = ends + self.end_slopes * self.end_slopes.new_tensor([self.reach, -self.reach])
        return torch.cat([ends[:, :1], grid.to(c.dtype), ends[:, 1:]], dim=1)

    @torch.no_grad()
    def _intercepts(self, u: Tensor) -> Tensor:
        """The intercept of the piece that each ``u`` [B, channels, positions] lies on."""
        piece = locate(u, self.reach, self.intervals)[0] + 1
        piece = torch.where(u < -self.reach, 0, torch.where(u > self.reach, self.intervals + 1, piece))
        table = self._intercept_table().expand(len(u), -1, -1)
        return table.gather(2, piece)

    def slopes(self) -> Tensor:
        """Slope of every linear piece on the grid: [channels, intervals]."""
        return self.coefficients.diff(dim=1) / self.step

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        slope = float(self.coefficients.detach().double().diff(dim=1).abs().amax()) / self.step
        slope = slope if math.isfinite(slope) else math.inf
        if self.end_slopes is not None:
            slope = max(slope, float(self.end_slopes.abs().amax()))
        return OperatorNorms.uniform(slope)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        positions = math.prod(shapes.input[1:])
        shared, a = min(g.l1, math.sqrt(positions) * g.l2), self._factor()
        if a is None:
            return {"coefficients": shared}
        a = a.detach().double()
        intercept = float((self._intercept_table().double() / a**2).abs().amax())
        # No cotangent and an infinite intercept make 0, not NaN.
        return {"coefficients": shared / float(a.amin()), "scale": shared * intercept if shared > 0 else 0.0}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        u, a = self._flat(x), self._factor()
        cotangent = g.reshape(u.shape)
        if a is not None:
            a = a.detach()
            u, cotangent = a * u, cotangent / a
        grad = linear_spline_coefficient_grad(u, self.intervals + 1, self.reach, cotangent)
        if a is None or self.scale is None:
            return {"coefficients": grad}
        free = (self.scale >= self.scale_range[0]) & (self.scale <= self.scale_range[1])
        return {"coefficients": grad, "scale": -(cotangent / a * self._intercepts(u)).sum(2) * free}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Extremes over the box: at its ends or at a knot inside it."""
        at_lower, at_upper = self(lower), self(upper)
        low, high = torch.minimum(at_lower, at_upper), torch.maximum(at_lower, at_upper)
        shape = (1, self.channels) + (1,) * (lower.ndim - 2)
        factor = self._factor()
        a = lower.new_ones(shape) if factor is None else factor.view(shape)
        for k in range(self.intervals + 1):
            knot, value = k * self.step - self.reach, self.coefficients[:, k].view(shape) / a
            # A hair wider than the box, so that rounding of the knot's position can only add a candidate.
            hair = 1e-12 * (self.reach + abs(knot))
            inside = (a * lower <= knot + hair) & (knot - hair <= a * upper)
            low = torch.where(inside, torch.minimum(low, value), low)
            high = torch.where(inside, torch.maximum(high, value), high)
        return low, high

    @torch.no_grad()
    def project_(self) -> None:
        """Put every slope into [-1, 1] and the scale into its range."""
        self.coefficients.copy_(SPLINE_PROJECTIONS[self.projection](self.coefficients.double(), self.step))
        if self.scale is not None:
            self.scale.clamp_(*self.scale_range)

    def tv2(self) -> Tensor:
        """Second-order total variation ``sum |change of slope|`` on the grid, over all channels: a scalar penalty for
        few pieces. The scale does not change it."""
        return self.slopes().diff(dim=1).abs().sum()

    def linear_regions(self, tolerance: float = 1e-3) -> Tensor:
        """Number of distinct linear pieces on the grid, per channel [channels]."""
        return (self.slopes().detach().diff(dim=1).abs() > tolerance).sum(1) + 1

    def fan_in(self, shapes: Shapes) -> int:
        return 10 if self.scale is None else 14

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, intervals={self.intervals}, reach={self.reach:g}, ends={self.ends!r}, "
            f"scaled={self.scale is not None}, projection={self.projection!r}"
        )
