# SPDX-License-Identifier: Apache-2.0
"""Householder activations: pairs of channels reflected across a learned line."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["Householder"]


class Householder(LipschitzLayer):
    r"""``y = z`` where ``v . z > 0`` and ``y = (I - 2 v v^T) z`` elsewhere, for every pair ``z`` of channels.

    ``v = (sin(angle / 2), -cos(angle / 2))`` with one learned angle per pair, shared over positions; in one line,
    ``y = z + 2 v relu(-v . z)``. An angle of pi/2 sorts each pair in descending order.

    Shapes: ``x`` [B, 2 K, *] in consecutive pairs, ``angle`` [K], ``y`` as ``x``.

    Guarantee. Continuous and orthogonal almost everywhere: 1-Lipschitz in l_2 and ``max(1, |cos angle| + |sin angle|)
    <= sqrt(2)`` in l_inf and l_1. The derivative of ``y`` in the angle is at most as long as ``z``, so one
    example's gradient is at most ``min(||g||_2 ||x||_2, sqrt(2) ||g||_inf ||x||_1, sqrt(2) ||x||_inf min(||g||_1,
    sqrt(S) ||g||_2))`` with S positions: the input must be bounded.

    Source: Singla, Singla, Feizi, Improved Deterministic l2 Robustness on CIFAR-10 and CIFAR-100, ICLR 2022, section 4.

    Args:
        channels: number of channels, even.
        angle: initial angle of every pair, in radians.

    Raises:
        ConfigError: ``channels`` is not even and positive, or ``angle`` is not finite.
        ValueError: ``forward`` gets anything but [B, channels, *].
    """

    def __init__(self, channels: int, angle: float = math.pi / 2) -> None:
        super().__init__()
        if channels < 2 or channels % 2 or not math.isfinite(angle):
            raise ConfigError(
                f"Householder: expected an even number of channels and a finite angle, got {channels} and {angle}; "
                "fix them"
            )
        self.channels = channels
        self.angle = nn.Parameter(torch.full((channels // 2,), float(angle)))

    def _pairs(self, x: Tensor) -> Tensor:
        """``x`` as [2, B, K, S]."""
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"Householder: expected x [B, {self.channels}, *], got {tuple(x.shape)}")
        size = (x.shape[0], self.channels // 2, 2, math.prod(x.shape[2:]))
        return x.reshape(size).movedim(2, 0)

    def _normal(self) -> Tensor:
        """``v`` as [2, 1, K, 1]."""
        half = self.angle / 2
        return torch.stack([half.sin(), -half.cos()])[:, None, :, None]

    def _reflect(self, z: Tensor) -> Tensor:
        v = self._normal()
        return z + 2 * v * torch.relu(-(v * z).sum(0))

    def forward(self, x: Tensor) -> Tensor:
        return self._reflect(self._pairs(x)).movedim(0, 2).reshape(x.shape)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        angle = self.angle.detach().double()
        row = max(1.0, float((angle.cos().abs() + angle.sin().abs()).amax()) * (1 + 1e-15))
        row = row if math.isfinite(row) else math.inf
        return OperatorNorms(inf_inf=row, two_inf=1.0, two_two=1.0, one_one=row, one_inf=1.0)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        positions, root = math.prod(shapes.input[1:]), math.sqrt(2)
        summed = Norms(g.dim, l1=min(g.l1, math.sqrt(positions) * g.l2))
        entrywise = Norms(x.dim, linf=x.linf).dot(summed)
        return {"angle": min(_pair(g.l2, x.l2), root * entrywise, root * _pair(g.linf, x.l1))}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        z, cotangent, v = self._pairs(x), self._pairs(g), self._normal()
        half = self.angle / 2
        turn = torch.stack([half.cos(), half.sin()])[:, None, :, None] / 2  # dv / dangle
        depth = torch.relu(-(v * z).sum(0))
        moved = 2 * turn * depth - 2 * v * (turn * z).sum(0) * (depth > 0)
        return {"angle": (cotangent * moved).sum((0, 3))}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The exact range: each pair is linear on either side of a line, so its extremes lie at the corners of the box
        and where the line meets the box's edges."""
        low, high, v = self._pairs(lower), self._pairs(upper), self._normal()
        points = [torch.stack([a[0], b[1]]) for a in (low, high) for b in (low, high)]
        for box in (low, high):
            for edge, other in ((0, 1), (1, 0)):
                # On v . z = 0 with z[edge] fixed; what is not finite or outside moves to the box, harmless there.
                at = (-v[edge] * box[edge] / v[other]).nan_to_num(0.0)
                pair = [box[edge], torch.minimum(torch.maximum(at, low[other]), high[other])]
                points.append(torch.stack(pair if edge == 0 else pair[::-1]))
        values = torch.stack([self._reflect(p) for p in points])
        ends = values.amin(0), values.amax(0)
        return ends[0].movedim(0, 2).reshape(lower.shape), ends[1].movedim(0, 2).reshape(lower.shape)

    def fan_in(self, shapes: Shapes) -> int:
        return 32  # eight roundings, of terms up to 3.5 times the entries

    def extra_repr(self) -> str:
        return f"{self.channels}"


def _pair(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b
