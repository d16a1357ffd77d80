# SPDX-License-Identifier: Apache-2.0
"""Average pooling."""

import pytest

from dplip.errors import ConfigError
from dplip.layers import AveragePool2d, LipschitzLayer
from dplip.testing import LayerContract


class TestDisjointWindows(LayerContract):
    in_shape = (2, 4, 4)

    def make(self) -> LipschitzLayer:
        return AveragePool2d(2)


class TestOverlappingWindows(LayerContract):
    in_shape = (1, 5, 5)

    def make(self) -> LipschitzLayer:
        return AveragePool2d(3, 2)


class TestDenseWindows(LayerContract):
    in_shape = (1, 5, 4)

    def make(self) -> LipschitzLayer:
        return AveragePool2d(3, 1)


class TestPadded(LayerContract):
    in_shape = (1, 4, 5)

    def make(self) -> LipschitzLayer:
        return AveragePool2d((3, 2), (1, 2), (1, 0))


class TestGaps(LayerContract):
    in_shape = (1, 5, 5)

    def make(self) -> LipschitzLayer:
        return AveragePool2d(2, 3)


@pytest.mark.parametrize("sizes", [(0,), (-1,), (2, 0)])
def test_sizes_are_positive(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="positive sizes"):
        AveragePool2d(*sizes)
