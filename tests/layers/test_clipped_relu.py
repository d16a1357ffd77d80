# SPDX-License-Identifier: Apache-2.0
"""ReLU with a learned threshold."""

import math

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LipschitzLayer, Shapes
from dplip.layers.clipped_relu import ClippedReLU
from dplip.norms import Norms
from dplip.testing import LayerContract


class TestPerEntry(LayerContract):
    in_shape = (5,)

    def make(self) -> LipschitzLayer:
        return ClippedReLU(5)


class TestPerChannel(LayerContract):
    in_shape = (2, 3)

    def make(self) -> LipschitzLayer:
        return ClippedReLU(2)


def test_the_gradient_of_a_saturated_neuron_reaches_the_bound() -> None:
    layer, g = ClippedReLU(1), torch.ones(1, 1, 4, 4) / 4
    grad = float(layer.per_sample_grad(torch.full((1, 1, 4, 4), 2.0), g)["theta"])
    bound = layer.param_sensitivity(Norms(16), Norms(16, l2=1.0), Shapes((1, 4, 4), (1, 4, 4)))["theta"]
    assert grad == bound == 4.0


def test_values_projection_and_nan() -> None:
    layer = ClippedReLU(4, 0.5)
    out = layer(torch.tensor([[-1.0, 0.25, 3.0, math.nan]]))
    assert out[0, :3].tolist() == [0.0, 0.25, 0.5] and bool(out[0, 3].isnan())
    with torch.no_grad():
        layer.theta.copy_(torch.tensor([-1.0, 0.0, 2.0, 3.0]))
    layer.project_()
    assert layer.theta.tolist() == [0.0, 0.0, 2.0, 3.0]


def test_refuses_bad_arguments() -> None:
    with pytest.raises(ConfigError):
        ClippedReLU(3, -1.0)
    with pytest.raises(ValueError, match="expected x"):
        ClippedReLU(3)(torch.zeros(2, 4))
