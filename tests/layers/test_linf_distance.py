# SPDX-License-Identifier: Apache-2.0
"""l_inf-distance neurons and their power-mean relaxation."""

from dplip.layers import LinfDistance, LipschitzLayer
from dplip.testing import LayerContract


class TestLinf(LayerContract):
    in_shape = (6,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return LinfDistance(6, 4)


class TestPowerMean8(LayerContract):
    in_shape = (6,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return LinfDistance(6, 4, p=8)


class TestPowerMean2(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return LinfDistance(5, 3, p=2, init="uniform")


class TestPowerMean1000(LayerContract):
    in_shape = (5,)

    def make(self) -> LipschitzLayer:
        return LinfDistance(5, 3, p=1000, bias=False)


class TestPlain(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return LinfDistance(5, 3, p=4, power_mean=False)


class TestOneByOne(LayerContract):
    in_shape = (1,)

    def make(self) -> LipschitzLayer:
        return LinfDistance(1, 1, bias=False, init="templates")
