# SPDX-License-Identifier: Apache-2.0
"""Sorting activations."""

from dplip.layers import GroupSort, LipschitzLayer, MaxMin
from dplip.testing import LayerContract


class TestMaxMin(LayerContract):
    in_shape = (8,)

    def make(self) -> LipschitzLayer:
        return MaxMin()


class TestMaxMinImage(LayerContract):
    in_shape = (4, 2, 2)

    def make(self) -> LipschitzLayer:
        return MaxMin()


class TestGroupSort(LayerContract):
    in_shape = (8,)

    def make(self) -> LipschitzLayer:
        return GroupSort(4)


class TestFullSort(LayerContract):
    in_shape = (6,)

    def make(self) -> LipschitzLayer:
        return GroupSort(0)
