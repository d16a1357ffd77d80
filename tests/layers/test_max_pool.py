# SPDX-License-Identifier: Apache-2.0
"""Maximum pooling."""

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LipschitzLayer, MaxPool2d, Shapes
from dplip.testing import LayerContract


class TestDisjoint(LayerContract):
    in_shape = (2, 4, 4)

    def make(self) -> LipschitzLayer:
        return MaxPool2d(2)


class TestOverlapping(LayerContract):
    in_shape = (1, 5, 5)

    def make(self) -> LipschitzLayer:
        return MaxPool2d(3, 1, 1)


class TestUneven(LayerContract):
    in_shape = (1, 4, 6)

    def make(self) -> LipschitzLayer:
        return MaxPool2d((2, 3), (1, 2), (1, 0))


def test_one_pixel_that_wins_all_its_windows_attains_the_overlap() -> None:
    pool, x = MaxPool2d(3, 1), torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    moved = x.clone()
    moved[0, 0, 2, 2] = 1.0
    norms = pool.operator_norms(Shapes((1, 5, 5), (1, 3, 3)))
    change = pool(moved) - pool(x)
    assert float(change.sum()) == norms.one_one == 9.0
    assert float(change.norm()) == pytest.approx(norms.two_two)


def test_ties_credit_one_entry() -> None:
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    MaxPool2d(2)(x).sum().backward()
    assert float(x.grad.sum()) == 4.0 and float(x.grad.max()) == 1.0


def test_bad_padding() -> None:
    with pytest.raises(ConfigError, match="half the window"):
        MaxPool2d(2, padding=2)
