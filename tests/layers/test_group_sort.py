# SPDX-License-Identifier: Apache-2.0
"""Sorting activations."""

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import GroupSort, LipschitzLayer, MaxMin
from dplip.testing import LayerContract


class TestMaxMin(LayerContract):
    in_shape = (8,)

    def make(self) -> LipschitzLayer:
        return MaxMin()


class TestMaxMinImage(LayerContract):
    in_shape = (4, 2, 2)

    def make(self) -> LipschitzLayer:
        return MaxMin()


class TestGroupSort(LayerContract):
    in_shape = (8,)

    def make(self) -> LipschitzLayer:
        return GroupSort(4)


class TestFullSort(LayerContract):
    in_shape = (6,)

    def make(self) -> LipschitzLayer:
        return GroupSort(0)


def test_values_by_hand() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0, -1.0]])
    assert MaxMin()(x).tolist() == [[1.0, 3.0, -1.0, 2.0]]
    assert GroupSort(4)(x).tolist() == GroupSort(0)(x).tolist() == [[-1.0, 1.0, 2.0, 3.0]]
    image = x.view(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert MaxMin()(image)[0, :, 1, 0].tolist() == [1.0, 3.0, -1.0, 2.0]


@pytest.mark.parametrize("size", [1, -2])
def test_group_sizes(size: int) -> None:
    with pytest.raises(ConfigError, match="group_size"):
        GroupSort(size)


def test_groups_divide_the_channels() -> None:
    for x in (torch.zeros(2, 5), torch.zeros(4)):
        with pytest.raises(ValueError, match="divisible by 2"):
            MaxMin()(x)
