# SPDX-License-Identifier: Apache-2.0
"""Average pooling."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from dplip.layers.base import LipschitzLayer, Shapes
from dplip.layers.window import Pair, Window, pair
from dplip.norms import OperatorNorms

__all__ = ["AveragePool2d"]


class AveragePool2d(LipschitzLayer):
    """Mean over every window; ``x`` [B, C, H, W] -> [B, C, H', W']. Padding counts as zeros.

    Guarantee. A row of the Jacobian has at most ``n = kh kw`` entries ``1/n`` and a column at most ``v`` of them, the
    windows that share an entry (exact for the size at hand, at most ``ceil(k/s)^2``): norms ``(1, n^-1/2, sqrt(v/n),
    v/n, 1/n)``.

    Args:
        kernel_size: number or pair.
        stride: ``kernel_size`` unless given.
        padding: zeros on both sides, at most half a window.

    Raises:
        ConfigError: a number is out of range.
        ValueError: ``forward`` gets anything but [B, C, H, W].
    """

    def __init__(self, kernel_size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0) -> None:
        super().__init__()
        self.window = Window(pair(kernel_size), pair(kernel_size if stride is None else stride), pair(padding))
        self.window.require_half_padding()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"AveragePool2d: expected x [B, C, H, W], got {tuple(x.shape)}")
        return F.avg_pool2d(x, self.window.kernel, self.window.stride, self.window.padding)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        n, v = math.prod(self.window.kernel), self.window.overlap((shapes.input[1], shapes.input[2]))
        return OperatorNorms(1.0, n**-0.5, math.sqrt(v / n), v / n, 1 / n)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    def fan_in(self, shapes: Shapes) -> int:
        return math.prod(self.window.kernel)

    def extra_repr(self) -> str:
        return str(self.window)
