# SPDX-License-Identifier: Apache-2.0
"""Projection of every example onto an l_2 ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["BallClip"]


class BallClip(LipschitzLayer):
    """``y = x min(1, radius / ||x||_2)`` over all entries of one example: its Euclidean projection onto the ball.

    Shapes: [B, *] -> the same.

    Guarantee. ``||y||_2 <= radius`` for every input. 1-Lipschitz in l_2 (projection onto a convex set). In l_inf and
    l_1 the norm is ``(1 + sqrt(N)) / 2`` for N entries: the Jacobian is ``(radius / ||x||)(I - u u^T)`` and a row of
    ``I - u u^T`` has l_1 norm ``1 - 2 u_i^2 + |u_i| ||u||_1``. For l_inf networks clip to a box
    (:class:`dplip.layers.Clamp`) instead.

    Raises:
        ConfigError: ``radius`` is not positive and finite.
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        if not 0 < radius < math.inf:
            raise ConfigError(f"BallClip: expected 0 < radius < inf, got {radius}; fix it")
        self.radius = float(radius)

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))
        return x * (self.radius / norm.clamp_min(self.radius))

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        side = (1 + math.sqrt(shapes.in_dim)) / 2
        return OperatorNorms(inf_inf=side, two_inf=1.0, two_two=1.0, one_one=side, one_inf=1.0)

    def range_bound(self, shapes: Shapes) -> Norms:
        return Norms(shapes.out_dim, l2=self.radius * (1 + 1e-6))  # float32 rounding of the quotient

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The factor lies between those of the box's farthest and nearest point."""
        shape = (-1, *[1] * (lower.ndim - 1))
        far = torch.linalg.vector_norm(torch.maximum(lower.abs(), upper.abs()).flatten(1), dim=1).view(shape)
        near = torch.maximum(lower, -upper).clamp_min(0)
        near = torch.linalg.vector_norm(near.flatten(1), dim=1).view(shape)
        least, most = self.radius / far.clamp_min(self.radius), self.radius / near.clamp_min(self.radius)
        return torch.minimum(lower * least, lower * most), torch.maximum(upper * least, upper * most)

    def fan_in(self, shapes: Shapes) -> int:
        return shapes.in_dim + 4

    def extra_repr(self) -> str:
        return f"{self.radius:g}"
