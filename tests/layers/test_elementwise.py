# SPDX-License-Identifier: Apache-2.0
"""Elementwise maps."""

import math

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import Abs, Clamp, LipschitzLayer, Monotone, Scale
from dplip.layers.base import Shapes
from dplip.norms import Norms
from dplip.testing import LayerContract


class TestAbs(LayerContract):
    in_shape = (6,)

    def make(self) -> LipschitzLayer:
        return Abs()


class TestClamp(LayerContract):
    in_shape = (6,)

    def make(self) -> LipschitzLayer:
        return Clamp(-0.5, 0.8)


class TestClampToPoint(LayerContract):
    in_shape = (3,)

    def make(self) -> LipschitzLayer:
        return Clamp(0.5, 0.5)


class TestClampFromBelow(LayerContract):
    in_shape = (2, 3)

    def make(self) -> LipschitzLayer:
        return Clamp(0.0, math.inf)


class TestScale(LayerContract):
    in_shape = (5,)

    def make(self) -> LipschitzLayer:
        return Scale(-2.5)


class TestScaleZero(LayerContract):
    in_shape = (3,)

    def make(self) -> LipschitzLayer:
        return Scale(0.0)


class TestMonotone(LayerContract):
    in_shape = (6,)

    def make(self) -> LipschitzLayer:
        return Monotone(torch.sigmoid, 0.25, bound=1.0)


class TestRelu(LayerContract):
    in_shape = (2, 3)

    def make(self) -> LipschitzLayer:
        return Monotone(torch.relu, roundings=0)


def test_clamp_caps_a_move_and_an_output() -> None:
    shapes = Shapes((4,), (4,))
    assert Clamp(-1.0, 2.0).output_bound(Norms(4), shapes).linf == 3.0
    assert Clamp(-1.0, 2.0).output_bound(Norms(4, linf=0.5), shapes).linf == 0.5
    assert Clamp(-1.0, 2.0).range_bound(shapes) == Norms(4, linf=2.0)
    assert Clamp(0.0, math.inf).range_bound(shapes) is None
    assert Clamp(0.0, math.inf).output_bound(Norms(4), shapes).linf == math.inf


@pytest.mark.parametrize("ends", [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)])
def test_clamp_ends_are_ordered(ends: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="lower <= upper"):
        Clamp(*ends)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_scale_is_finite(factor: float) -> None:
    with pytest.raises(ConfigError, match="finite factor"):
        Scale(factor)
