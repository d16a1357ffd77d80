# SPDX-License-Identifier: Apache-2.0
"""Sorting activations, which preserve every norm."""

from __future__ import annotations

import math

from torch import Tensor

from dplip.errors import ConfigError
from dplip.kernels.group_sort import group_sort
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import OperatorNorms

__all__ = ["GroupSort", "MaxMin"]


class GroupSort(LipschitzLayer):
    """Sorts consecutive groups of ``group_size`` channels (axis 1) in ascending order; ``group_size=0`` sorts all.

    Shapes: ``x`` [B, C, *] with ``group_size`` dividing C -> the same.

    Guarantee. The Jacobian is a permutation: norm 1 in every norm, forward and backward, and norms are preserved
    exactly. Over a box, sorted lower ends and sorted upper ends are the exact range.

    Source: Anil, Lucas, Grosse, Sorting out Lipschitz function approximation, ICML 2019, section 4.

    Raises:
        ConfigError: ``group_size`` is 1 or negative.
        ValueError: ``group_size`` does not divide the number of channels.
    """

    def __init__(self, group_size: int = 2) -> None:
        super().__init__()
        if group_size < 0 or group_size == 1:
            raise ConfigError(f"GroupSort: expected group_size 0 (all) or >= 2, got {group_size}; choose one")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        size = self.group_size or x.shape[1]
        if x.ndim < 2 or x.shape[1] % size:
            raise ValueError(f"GroupSort: expected x [B, C, *] with C divisible by {size}, got {tuple(x.shape)}")
        return group_sort(x.reshape(*x.shape[:2], math.prod(x.shape[2:])), size).reshape(x.shape)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms.uniform(1.0)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"


class MaxMin(GroupSort):
    """:class:`GroupSort` on pairs: ``(x_1, x_2) -> (min, max)``."""

    def __init__(self) -> None:
        super().__init__(2)
