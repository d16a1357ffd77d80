# SPDX-License-Identifier: Apache-2.0
"""Order-statistic neurons."""

from dplip.layers import LipschitzLayer, SortLinear
from dplip.testing import LayerContract


class TestGeometric(LayerContract):
    in_shape = (7,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return SortLinear.geometric(7, 4, rho=0.3)


class TestTruncated(LayerContract):
    in_shape = (12,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return SortLinear.geometric(12, 3, rho=0.7, truncation=9)


class TestTopK(LayerContract):
    in_shape = (6,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return SortLinear.top_k_mean(6, 4, 3)


class TestMean(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight"})

    def make(self) -> LipschitzLayer:
        return SortLinear.top_k_mean(5, 4, 5, bias=False)


class TestIncreasing(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight"})

    def make(self) -> LipschitzLayer:
        return SortLinear(5, 3, [0.1, 0.2, 0.6])
