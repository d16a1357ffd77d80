# SPDX-License-Identifier: Apache-2.0
"""Householder activations."""

import math

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import Householder, LipschitzLayer
from dplip.testing import LayerContract


class TestHouseholder(LayerContract):
    in_shape = (6,)
    tight = frozenset({"angle"})
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return Householder(6)


class TestHouseholderOverPositions(LayerContract):
    in_shape = (4, 3)
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return Householder(4, angle=0.7)


def test_a_right_angle_sorts_pairs_in_descending_order() -> None:
    x = torch.randn(20, 6, dtype=torch.float64)
    pairs = x.view(20, 3, 2)
    expected = torch.stack([pairs.amax(2), pairs.amin(2)], 2).view(20, 6)
    torch.testing.assert_close(Householder(6).double()(x), expected, rtol=0, atol=1e-6)  # the angle is float32


def test_interval_is_the_exact_range() -> None:
    layer = Householder(2, angle=1.1).double()
    lower, upper = torch.tensor([[-1.0, -0.4]], dtype=torch.float64), torch.tensor([[0.7, 1.2]], dtype=torch.float64)
    grid = torch.cartesian_prod(
        *(torch.linspace(a, b, 801, dtype=torch.float64) for a, b in ((-1.0, 0.7), (-0.4, 1.2)))
    )
    values = layer(grid).detach()
    low, high = layer.interval(lower, upper)
    torch.testing.assert_close(low[0].detach(), values.amin(0), rtol=0, atol=3e-3)
    torch.testing.assert_close(high[0].detach(), values.amax(0), rtol=0, atol=3e-3)


@pytest.mark.parametrize(("channels", "angle"), [(3, 1.0), (0, 1.0), (2, math.nan)])
def test_bad_arguments_are_refused(channels: int, angle: float) -> None:
    with pytest.raises(ConfigError):
        Householder(channels, angle)
