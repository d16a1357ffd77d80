# SPDX-License-Identifier: Apache-2.0
"""Elementwise maps without parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["Abs", "Clamp", "Monotone", "Scale"]


class Monotone(LipschitzLayer):
    """Applies a non-decreasing ``function`` entry by entry.

    Args:
        function: maps a tensor to one of the same shape, each entry by itself; non-decreasing.
        lipschitz: its largest slope.
        bound: ``sup |function|``, if finite.
        roundings: rounded operations per entry (0 for functions that only select).
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        lipschitz: float = 1.0,
        bound: float = math.inf,
        roundings: int = 4,
    ) -> None:
        super().__init__()
        self.function, self.lipschitz, self.bound, self.roundings = function, lipschitz, bound, roundings

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms.uniform(self.lipschitz)

    def range_bound(self, shapes: Shapes) -> Norms | None:
        return Norms(shapes.out_dim, linf=self.bound) if math.isfinite(self.bound) else None

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    def fan_in(self, shapes: Shapes) -> int:
        return self.roundings

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", "")


class Clamp(LipschitzLayer):
    """``y = min(max(x, lower), upper)``: clips the input to a box; 1-Lipschitz in every norm.

    Placed first, it *enforces* the input domain on which later bounds rest.

    Raises:
        ConfigError: ``lower > upper`` or either is NaN.
    """

    def __init__(self, lower: float = 0.0, upper: float = 1.0) -> None:
        super().__init__()
        if not lower <= upper:
            raise ConfigError(f"Clamp: expected lower <= upper, got {lower} and {upper}; swap or fix them")
        self.lower, self.upper = float(lower), float(upper)

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.lower, self.upper)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms.uniform(1.0)

    def range_bound(self, shapes: Shapes) -> Norms | None:
        largest = max(abs(self.lower), abs(self.upper))
        return Norms(shapes.out_dim, linf=largest) if math.isfinite(largest) else None

    def output_bound(self, x: Norms, shapes: Shapes) -> Norms:
        width = self.upper - self.lower
        capped = Norms(shapes.out_dim, linf=width) if math.isfinite(width) else Norms(shapes.out_dim)
        return super().output_bound(x, shapes).meet(capped)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    def extra_repr(self) -> str:
        return f"{self.lower:g}, {self.upper:g}"


class Abs(LipschitzLayer):
    """``y = |x|``; 1-Lipschitz in every norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms.uniform(1.0)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        near = torch.maximum(lower, -upper).clamp_min(0)
        return near, torch.maximum(lower.abs(), upper.abs())


class Scale(LipschitzLayer):
    """``y = factor * x`` with a fixed public ``factor``; Lipschitz constant ``|factor|`` in every norm.

    ``Scale(-1)`` turns distances into logits (near is large).
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        if not math.isfinite(factor):
            raise ConfigError(f"Scale: expected a finite factor, got {factor}; fix it")
        self.factor = float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms.uniform(abs(self.factor))

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self(lower), self(upper)
        return torch.minimum(a, b), torch.maximum(a, b)

    def fan_in(self, shapes: Shapes) -> int:
        return 1

    def extra_repr(self) -> str:
        return f"{self.factor:g}"
