# SPDX-License-Identifier: Apache-2.0
"""Affine layers in a norm ball."""

from dplip.layers import LipschitzLayer, NormalizedLinear
from dplip.testing import LayerContract


class TestSpectral(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="spectral")


class TestFrobenius(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="frobenius")


class TestRowsL1(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"inf_inf": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="rows_l1")


class TestColumnsL1(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"one_one": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="columns_l1")


class TestTall(LayerContract):
    in_shape = (3,)
    tight = frozenset({"weight"})
    constraint = {"two_two": 0.5}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(3, 6, max_norm=0.5, bias=False)
