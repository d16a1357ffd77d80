# SPDX-License-Identifier: Apache-2.0
"""Elementwise maps."""

import math

import torch

from dplip.layers import Abs, Clamp, LipschitzLayer, Monotone, Scale
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
