# SPDX-License-Identifier: Apache-2.0
"""A frozen, public, bounded layer of random cosines beside the (clipped) input itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dplip.errors import ConfigError
from dplip.layers.ball_clip import BallClip
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms
from dplip.operator_norm import matrix_norms

__all__ = ["RandomFeatures"]


class RandomFeatures(LipschitzLayer):
    r"""``y = [cos(W u + b) / sqrt(m), (linear / radius) u]`` with ``u = x min(1, radius / ||x||_2)``.

    Shapes: ``x`` [B, in_features] -> ``y`` [B, count + in_features], ``m = count``. ``W`` and ``b`` are buffers drawn
    from a public seed: row ``k`` of ``W`` is Gaussian of scale ``s_k / sqrt(in_features)``, ``s_k`` log-uniform in
    [``low``, ``high``]; ``b`` is uniform in [0, 2 pi). Nothing is learned, so nothing is spent.

    Guarantee. ``||y||_2 <= sqrt(1 + linear^2)`` for every input, which is what a layer behind it needs for its
    sensitivity. A Jacobian is ``diag(+-sin) W / sqrt(m)`` on top of ``(linear / radius) I``, times that of the
    projection; shrinking rows shrinks all five norms, so they are those of the stacked matrix times those of
    :class:`dplip.layers.BallClip`.

    Source: Rahimi and Recht, Random Features for Large-Scale Kernel Machines, NeurIPS 2007 (here a mixture of
    bandwidths).

    Args:
        in_features: number of inputs.
        count: number of cosines.
        radius: inputs are projected onto the ball of this radius.
        low, high: smallest and largest frequency scale.
        linear: weight of the input itself.
        seed: public seed of ``W`` and ``b``.

    Raises:
        ConfigError: a size, radius or scale is not positive and finite, ``low > high``, or ``linear < 0``.
        ValueError: ``forward`` gets anything but [B, in_features].
    """

    weight: Tensor
    phase: Tensor

    def __init__(
        self,
        in_features: int,
        count: int,
        *,
        radius: float,
        low: float = 0.5,
        high: float = 2.0,
        linear: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        fits = in_features >= 1 and count >= 1 and 0 < radius < math.inf and 0 < low <= high < math.inf
        if not fits or not 0 <= linear < math.inf:
            raise ConfigError(
                "RandomFeatures: expected positive sizes and radius, 0 < low <= high and linear >= 0, got "
                f"{in_features}, {count}, {radius}, {low}, {high} and {linear}; fix them"
            )
        generator = torch.Generator().manual_seed(seed)
        scale = low * (high / low) ** torch.rand(count, 1, generator=generator)
        weight = torch.randn(count, in_features, generator=generator) * scale / math.sqrt(in_features)
        self.register_buffer("weight", weight.to(torch.get_default_dtype()))
        phase = 2 * math.pi * torch.rand(count, generator=generator)
        self.register_buffer("phase", phase.to(torch.get_default_dtype()))
        self.in_features, self.count, self.linear = in_features, count, float(linear)
        self.clip = BallClip(radius)
        self._norms: tuple[Tensor, OperatorNorms] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"RandomFeatures: expected x [B, {self.in_features}], got {tuple(x.shape)}")
        u = self.clip(x)
        waves = F.linear(u, self.weight, self.phase).cos() / math.sqrt(self.count)
        return torch.cat([waves, u * (self.linear / self.clip.radius)], 1)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        if self._norms is None or not torch.equal(self._norms[0], self.weight):
            eye = torch.eye(self.in_features, dtype=torch.float64) * (self.linear / self.clip.radius)
            waves = self.weight.detach().double().cpu() / math.sqrt(self.count)
            self._norms = (self.weight.detach().clone(), matrix_norms(torch.cat([waves, eye])))
        m = self._norms[1]
        clip = self.clip.operator_norms(Shapes(shapes.input, shapes.input)).closed(shapes.in_dim, shapes.in_dim)
        return OperatorNorms(
            inf_inf=m.inf_inf * clip.inf_inf,
            two_inf=m.two_inf * clip.two_two,
            two_two=m.two_two * clip.two_two,
            one_one=m.one_one * clip.one_one,
            one_inf=min(m.one_inf * clip.one_one, m.two_inf * clip.two_two),
        )

    def range_bound(self, shapes: Shapes) -> Norms:
        return Norms(shapes.out_dim, l2=math.hypot(1.0, self.linear) * (1 + 1e-6))  # float32 rounding of 1/sqrt(m)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = self.clip.interval(lower, upper)
        centre = F.linear((lower + upper) / 2, self.weight, self.phase)
        reach = F.linear((upper - lower) / 2, self.weight.abs())
        low, high = _cosine(centre - reach, centre + reach)
        factor = self.linear / self.clip.radius
        norm = math.sqrt(self.count)
        return torch.cat([low / norm, lower * factor], 1), torch.cat([high / norm, upper * factor], 1)

    def fan_in(self, shapes: Shapes) -> int:
        return 2 * self.in_features + 8

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.count}, radius={self.clip.radius:g}, linear={self.linear:g}"


def _cosine(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Range of the cosine over [lower, upper]: 1 or -1 where the box meets a multiple of pi, else the ends."""
    slack = 8 * torch.finfo(lower.dtype).eps * (1 + torch.maximum(lower.abs(), upper.abs()))
    lower, upper = lower - slack, upper + slack  # so that a multiple of pi is never missed by rounding
    a, b = lower.cos(), upper.cos()

    def meets(offset: float) -> Tensor:
        return ((lower - offset) / (2 * math.pi)).ceil() * (2 * math.pi) <= upper - offset

    high = torch.where(meets(0.0), torch.ones_like(a), torch.maximum(a, b))
    low = torch.where(meets(math.pi), -torch.ones_like(a), torch.minimum(a, b))
    return low, high
