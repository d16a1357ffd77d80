# SPDX-License-Identifier: Apache-2.0
"""Average pooling."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import OperatorNorms

__all__ = ["AveragePool2d"]


class AveragePool2d(LipschitzLayer):
    """Mean over square windows of side ``k``, stride ``s`` (default ``k``), no padding.

    Shapes: [B, C, H, W] -> [B, C, (H - k) // s + 1, (W - k) // s + 1].

    Guarantee. A row of the Jacobian has ``n = k^2`` entries ``1/n`` and a column at most ``v = ceil(k/s)^2`` of them:
    norms ``(1, n^-1/2, sqrt(v/n), v/n, 1/n)``.

    Raises:
        ConfigError: ``kernel_size`` or ``stride`` is not positive.
    """

    def __init__(self, kernel_size: int, stride: int | None = None) -> None:
        super().__init__()
        stride = kernel_size if stride is None else stride
        if kernel_size < 1 or stride < 1:
            raise ConfigError(
                f"AveragePool2d: expected positive sizes, got {kernel_size} and {stride}; fix them"
            )
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.kernel_size, self.stride)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        n, v = self.kernel_size**2, math.ceil(self.kernel_size / self.stride) ** 2
        return OperatorNorms(1.0, n**-0.5, math.sqrt(v / n), v / n, 1 / n)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    def fan_in(self, shapes: Shapes) -> int:
        return self.kernel_size**2

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}"
