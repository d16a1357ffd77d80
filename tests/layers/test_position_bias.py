# SPDX-License-Identifier: Apache-2.0
"""A bias per channel shared over positions."""

import torch

from dplip.layers import LipschitzLayer, PositionBias, Shapes
from dplip.norms import Norms
from dplip.testing import LayerContract


class TestDenseBias(LayerContract):
    in_shape = (4,)
    tight = frozenset({"bias"})

    def make(self) -> LipschitzLayer:
        return PositionBias(4)


class TestPositionBias(LayerContract):
    in_shape = (2, 3, 2)
    tight = frozenset({"bias"})

    def make(self) -> LipschitzLayer:
        return PositionBias(2)


def test_a_constant_cotangent_reaches_the_square_root_of_the_positions() -> None:
    layer, g = PositionBias(1), torch.ones(1, 1, 4, 4) / 4  # ||g||_2 = 1, the gradient is 4 = sqrt(16)
    grad = float(layer.per_sample_grad(torch.zeros(1, 1, 4, 4), g)["bias"])
    bound = layer.param_sensitivity(Norms(16), Norms(16, l2=1.0), Shapes((1, 4, 4), (1, 4, 4)))["bias"]
    assert grad == bound == 4.0
