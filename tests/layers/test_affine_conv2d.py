# SPDX-License-Identifier: Apache-2.0
"""Convolutions without a constraint, as the rules make them of torch.nn.Conv2d."""

import math

import pytest
import torch
from torch import nn

from dplip.layers import AffineConv2d, LipschitzLayer, Shapes
from dplip.layers.window import Window
from dplip.norms import Norms
from dplip.testing import LayerContract


def convolution(*sizes: int, window: Window, groups: int = 1) -> AffineConv2d:
    weight, bias = nn.Parameter(torch.randn(*sizes)), nn.Parameter(torch.randn(sizes[0]))
    return AffineConv2d(weight, bias, window, groups)


class TestPadded(LayerContract):
    in_shape = (2, 3, 4)
    tight = frozenset({"bias"})

    def make(self) -> LipschitzLayer:
        return convolution(2, 2, 3, 3, window=Window((3, 3), padding=(1, 1)))


class TestStridedGroups(LayerContract):
    in_shape = (2, 5, 4)
    parameter_draws = ("initial", "large", "tied")

    def make(self) -> LipschitzLayer:
        return convolution(4, 1, 3, 2, window=Window((3, 2), (2, 1), (0, 1)), groups=2)


class TestDilated(LayerContract):
    in_shape = (1, 5, 5)
    parameter_draws = ("initial", "large", "tied")

    def make(self) -> LipschitzLayer:
        return convolution(2, 1, 2, 3, window=Window((2, 3), (2, 1), (1, 1), (2, 2)))


class TestOneWindow(LayerContract):
    """A single window is a linear layer, whose bounds are reached."""

    in_shape = (2, 2, 2)
    parameter_draws = ("initial", "large", "tied")
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return convolution(3, 2, 2, 2, window=Window((2, 2)))


class TestPointwise(LayerContract):
    in_shape = (3, 2, 2)
    parameter_draws = ("initial", "large", "tied")

    def make(self) -> LipschitzLayer:
        return convolution(2, 3, 1, 1, window=Window((1, 1)))


@pytest.mark.parametrize("n", [4, 8, 16])
def test_a_constant_image_comes_close_to_the_sharing_factor(n: int) -> None:
    """``||G P^T||_F`` over ``sqrt(v) ||G|| ||x||`` tends to 1 with the image's size, and never passes it."""
    layer = convolution(1, 1, 3, 3, window=Window((3, 3), padding=(1, 1))).double()
    x = g = torch.ones(1, 1, n, n, dtype=torch.float64)
    shapes = Shapes((1, n, n), (1, n, n))
    bound = layer.param_sensitivity(Norms(n * n, l2=n), Norms(n * n, l2=n), shapes)["weight"]
    found = float(layer.per_sample_grad(x, g)["weight"].norm())
    assert bound == pytest.approx(3 * n * n)
    assert (1 - 2.4 / n) * bound <= found <= bound


def test_patches_bound_the_gradient_where_images_are_bounded_entrywise() -> None:
    layer = convolution(1, 2, 3, 3, window=Window((3, 3))).double()
    shapes = Shapes((2, 9, 9), (1, 7, 7))
    bounds = layer.param_sensitivity(Norms(162, linf=1.0), Norms(49, l1=1.0), shapes)
    assert bounds["weight"] == pytest.approx(math.sqrt(18)) and bounds["bias"] == 1.0


def test_input_without_a_batch_axis_is_refused() -> None:
    layer = convolution(2, 3, 1, 1, window=Window((1, 1)))
    with pytest.raises(ValueError, match="expected x"):
        layer(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="as large as"):
        convolution(2, 3, 3, 3, window=Window((3, 3)))(torch.zeros(1, 3, 2, 5))


def test_bounds_follow_the_size_and_the_weight() -> None:
    layer = convolution(1, 1, 3, 3, window=Window((3, 3), padding=(1, 1))).double()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    small, large = (layer.operator_norms(Shapes((1, n, n), (1, n, n))).two_two for n in (2, 20))
    assert 4.0 <= small == pytest.approx(6.0) and 8.9 < large < 9.2
    layer.weight.data.mul_(2)
    assert layer.operator_norms(Shapes((1, 2, 2), (1, 2, 2))).two_two == pytest.approx(12.0)
