# SPDX-License-Identifier: Apache-2.0
"""Frozen cosines beside the input."""

import math

import pytest
import torch

from dplip.bounds import InputDomain
from dplip.errors import ConfigError
from dplip.layers import LipschitzLayer, NormalizedLinear, RandomFeatures
from dplip.layers.base import Shapes
from dplip.losses import BinaryCrossEntropy
from dplip.privacy import StepSensitivity
from dplip.testing import LayerContract


class TestRandomFeatures(LayerContract):
    in_shape = (5,)

    def make(self) -> LipschitzLayer:
        return RandomFeatures(5, 7, radius=1.5, low=0.5, high=3.0)


class TestWithoutTheInput(LayerContract):
    in_shape = (2,)

    def make(self) -> LipschitzLayer:
        return RandomFeatures(2, 3, radius=4.0, low=2.0, high=6.0, linear=0.0)


def test_the_range_is_attained() -> None:
    layer = RandomFeatures(1, 1, radius=2.0, linear=0.5).double()
    layer.weight.fill_(math.pi)
    layer.phase.zero_()
    x = torch.tensor([[2.0]], dtype=torch.float64)
    assert float(layer(x).norm()) == pytest.approx(layer.range_bound(Shapes((1,), (2,))).l2, rel=1e-5)


def test_nothing_is_learned_and_the_seed_decides() -> None:
    a, b, c = (RandomFeatures(3, 4, radius=1.0, seed=s) for s in (1, 1, 2))
    assert not list(a.parameters())
    assert torch.equal(a.weight, b.weight) and not torch.equal(a.weight, c.weight)


def test_a_head_behind_it_needs_no_input_domain() -> None:
    """The head's sensitivity is sqrt(1 + linear^2), whatever the inputs."""
    model = torch.nn.Sequential(RandomFeatures(3, 16, radius=1.0), NormalizedLinear(19, 1, bias=False, max_norm=9.0))
    bound = StepSensitivity(model, InputDomain((3,)), BinaryCrossEntropy()).tensors()["1.weight"].bound
    assert math.sqrt(2) <= bound <= math.sqrt(2) * 1.002


@pytest.mark.parametrize("change", [{"radius": 0.0}, {"low": 3.0}, {"linear": -1.0}, {"high": math.inf}])
def test_options_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="RandomFeatures: expected"):
        RandomFeatures(3, 4, **({"radius": 1.0} | change))
