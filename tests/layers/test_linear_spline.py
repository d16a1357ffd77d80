# SPDX-License-Identifier: Apache-2.0
"""Learned linear splines."""

from dplip.layers import LinearSpline, LipschitzLayer
from dplip.testing import LayerContract


class TestUnitEnds(LayerContract):
    in_shape = (4,)
    tight = frozenset({"coefficients"})
    constraint = {"inf_inf": 1.0, "two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return LinearSpline(4, intervals=7, reach=1.3, init="maxmin")


class TestClampedEnds(LayerContract):
    in_shape = (3,)
    tight = frozenset({"coefficients"})
    constraint = {"inf_inf": 1.0, "two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return LinearSpline(3, intervals=10, ends="clamp", init="relu")


class TestShared(LayerContract):
    in_shape = (2, 3, 2)
    tight = frozenset({"coefficients"})

    def make(self) -> LipschitzLayer:
        return LinearSpline(2, intervals=4, init="absolute_value")


class TestOneInterval(LayerContract):
    in_shape = (2,)

    def make(self) -> LipschitzLayer:
        return LinearSpline(2, intervals=1, reach=0.5)
