# SPDX-License-Identifier: Apache-2.0
"""Maximum pooling."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from dplip.layers.base import LipschitzLayer, Shapes
from dplip.layers.window import Pair, Window, pair
from dplip.norms import OperatorNorms

__all__ = ["MaxPool2d"]


class MaxPool2d(LipschitzLayer):
    """Largest entry of every window; ``x`` [B, C, H, W] -> [B, C, H', W']. Padding, at most half a window, never wins.

    Guarantee. A row of the Jacobian is one-hot (at a tie one entry gets the credit) and an entry lies in at most ``v``
    windows, exact for the size at hand, at most ``ceil(k/s)^2``: norms ``(1, 1, sqrt(v), v, 1)``.

    Args:
        kernel_size: number or pair.
        stride: ``kernel_size`` unless given.
        padding: entries of minus infinity on both sides.

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
            raise ValueError(f"MaxPool2d: expected x [B, C, H, W], got {tuple(x.shape)}")
        return F.max_pool2d(x, self.window.kernel, self.window.stride, self.window.padding)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        v = self.window.overlap((shapes.input[1], shapes.input[2]))
        return OperatorNorms(1.0, 1.0, math.sqrt(v), v, 1.0)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    def extra_repr(self) -> str:
        return str(self.window)
