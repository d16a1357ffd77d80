# SPDX-License-Identifier: Apache-2.0
"""The reference shift around layers with and without parameters."""

import torch

from dplip.layers import LinearSpline, LinfDistance, LipschitzLayer, NormalizedLinear, ReferenceShift
from dplip.testing import LayerContract


class TestDistance(LayerContract):
    in_shape = (5,)
    tight = frozenset({"layer.weight"})

    def make(self) -> LipschitzLayer:
        return ReferenceShift(LinfDistance(5, 4), 0.5)


class TestLinear(LayerContract):
    in_shape = (5,)
    tight = frozenset({"layer.weight"})

    def make(self) -> LipschitzLayer:
        return ReferenceShift(NormalizedLinear(5, 4), torch.linspace(0, 1, 5))


class TestSpline(LayerContract):
    in_shape = (2, 3)

    def make(self) -> LipschitzLayer:
        return ReferenceShift(LinearSpline(2, intervals=4))
