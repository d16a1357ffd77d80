# SPDX-License-Identifier: Apache-2.0
"""l_2-norm pooling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.layers.window import Pair, Window, pair
from dplip.norms import OperatorNorms

__all__ = ["L2Pool2d"]


class L2Pool2d(LipschitzLayer):
    r"""``y = (eps + sum_window x^2)^(1/2)`` per channel; ``x`` [B, C, H, W] -> [B, C, H', W'].

    Guarantee. A row of the Jacobian is ``x / y`` on its window, at most a unit vector, and an entry lies in at most
    ``v`` windows of at most ``n`` entries (both exact for the size at hand): norms ``(sqrt(n), 1, sqrt(v), v, 1)``.
    Windows that tile keep the l_2 norm of the image. ``eps > 0`` raises the output of a dark window to ``sqrt(eps)``,
    which the bounds see through the reference input; at ``eps = 0`` the gradient of a zero window is 0. Squares are
    taken of ratios, so they neither over- nor underflow.

    Source: Boureau, Ponce, LeCun, A Theoretical Analysis of Feature Pooling in Visual Recognition, ICML 2010.

    Args:
        kernel_size: number or pair.
        stride: ``kernel_size`` unless given.
        padding: zeros on both sides.
        eps: added under the root.

    Raises:
        ConfigError: a number is out of range.
        ValueError: ``forward`` gets anything but [B, C, H, W] with at least one window.
    """

    def __init__(
        self,
        kernel_size: int | Pair,
        stride: int | Pair | None = None,
        padding: int | Pair = 0,
        *,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= eps < math.inf:
            raise ConfigError(f"L2Pool2d: expected 0 <= eps < inf, got {eps}; fix it")
        self.window = Window(pair(kernel_size), pair(kernel_size if stride is None else stride), pair(padding))
        self.eps = float(eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"L2Pool2d: expected x [B, C, H, W], got {tuple(x.shape)}")
        entries, root = self.window.entries(x), math.sqrt(self.eps)
        largest = entries.detach().abs().amax(0).clamp_min(root)
        lit = largest > 0  # a dark window has no ratios; a constant root has gradient 0
        scale = torch.where(lit, largest, 1)
        squares = (entries / scale).square().sum(0) + (root / scale).square()
        return largest * torch.where(lit, squares, 1).sqrt()

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        size = (shapes.input[1], shapes.input[2])
        v, n = self.window.overlap(size), self.window.taps(size)
        return OperatorNorms(math.sqrt(n), 1.0, math.sqrt(v), v, 1.0)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Exact: the norm grows with every ``|x_i|``, and these range independently."""
        nearest = torch.maximum(lower, -upper).clamp_min(0)
        return self(nearest), self(torch.maximum(lower.abs(), upper.abs()))

    def fan_in(self, shapes: Shapes) -> int:
        return math.prod(self.window.kernel) + 8

    def extra_repr(self) -> str:
        return f"{self.window}, eps={self.eps:g}"
