# SPDX-License-Identifier: Apache-2.0
"""Layers that move or shift values."""

import torch

from dplip.layers import Flatten, LipschitzLayer, Reshape, Shift
from dplip.testing import LayerContract


class TestFlatten(LayerContract):
    in_shape = (2, 3)

    def make(self) -> LipschitzLayer:
        return Flatten()


class TestReshape(LayerContract):
    in_shape = (6,)

    def make(self) -> LipschitzLayer:
        return Reshape(2, -1)


class TestShift(LayerContract):
    in_shape = (4,)

    def make(self) -> LipschitzLayer:
        return Shift(torch.linspace(-1, 2, 4))


class TestShiftByNumber(LayerContract):
    in_shape = (2, 2)

    def make(self) -> LipschitzLayer:
        return Shift(0.3)
