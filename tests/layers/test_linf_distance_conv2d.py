# SPDX-License-Identifier: Apache-2.0
"""l_inf-distance neurons over windows."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dplip.errors import ConfigError
from dplip.layers import LinfDistance, LinfDistanceConv2d, LipschitzLayer, Shapes
from dplip.norms import Norms
from dplip.testing import LayerContract


class TestPadded(LayerContract):
    in_shape = (1, 4, 4)

    def make(self) -> LipschitzLayer:
        return LinfDistanceConv2d(1, 2, 3, padding=1)


class TestStridedGroups(LayerContract):
    in_shape = (2, 5, 4)
    parameter_draws = ("initial", "large", "tied")

    def make(self) -> LipschitzLayer:
        return LinfDistanceConv2d(2, 4, (3, 2), stride=2, padding=(1, 0), groups=2, bias=False)


class TestPowerMean(LayerContract):
    in_shape = (2, 3, 4)

    def make(self) -> LipschitzLayer:
        return LinfDistanceConv2d(2, 3, 2, p=8)


class TestDilated(LayerContract):
    in_shape = (1, 5, 5)
    parameter_draws = ("initial", "large", "tied")

    def make(self) -> LipschitzLayer:
        return LinfDistanceConv2d(1, 2, 2, dilation=3, padding=1, p=4, power_mean=False)


class TestOneWindow(LayerContract):
    """A single window is the dense layer, whose bounds are reached."""

    in_shape = (2, 2, 2)
    parameter_draws = ("initial", "large", "tied")
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return LinfDistanceConv2d(2, 3, 2)


def explicit(layer: LinfDistanceConv2d, x: Tensor) -> Tensor:
    """The definition, one window at a time."""
    w = layer.window
    padded = F.pad(x, (w.padding[1], w.padding[1], w.padding[0], w.padding[0]))
    height, width = w.positions(tuple(x.shape[2:]))
    per, seen = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    y = x.new_empty(len(x), layer.out_channels, height, width)
    filters = layer.weight.view(-1, seen, *w.kernel)
    for o in range(layer.out_channels):
        channels = slice(o // per * seen, (o // per + 1) * seen)
        for i in range(height):
            for j in range(width):
                rows = slice(i * w.stride[0], i * w.stride[0] + (w.kernel[0] - 1) * w.dilation[0] + 1, w.dilation[0])
                cols = slice(j * w.stride[1], j * w.stride[1] + (w.kernel[1] - 1) * w.dilation[1] + 1, w.dilation[1])
                t = (padded[:, channels, rows, cols] - filters[o]).abs().flatten(1)
                y[:, o, i, j] = t.amax(1) if math.isinf(layer.p) else t.pow(layer.p).mean(1) ** (1 / layer.p)
    return y if layer.bias is None else y + layer.bias[:, None, None]


@pytest.mark.parametrize("p", [math.inf, 6.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"groups": 2, "padding": (0, 2)},
        {"dilation": 2, "stride": (1, 3), "padding": 1},
    ],
)
def test_values_are_the_definition(p: float, options: dict) -> None:
    torch.manual_seed(0)
    layer = LinfDistanceConv2d(4, 6, (3, 2), p=p, **options).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), explicit(layer, x))


def test_one_window_is_the_dense_layer() -> None:
    torch.manual_seed(0)
    conv, dense = LinfDistanceConv2d(2, 5, 3).double(), LinfDistance(18, 5).double()
    dense.load_state_dict(conv.state_dict())
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    assert torch.equal(conv(x).flatten(1), dense(x.flatten(1)))
    around, g = Shapes((2, 3, 3), (5, 1, 1)), Norms(5, l1=2, l2=1.4)
    assert conv.param_sensitivity(Norms(18), g, around) == dense.param_sensitivity(Norms(18), g, around)
    assert conv.operator_norms(around) == dense.operator_norms(around)


def test_a_constant_image_attains_the_sharing_factor() -> None:
    """Every window of a filter picks the same tap, so gradients add up over all S positions."""
    layer = LinfDistanceConv2d(1, 2, 2).double()
    with torch.no_grad():
        layer.weight.zero_()[:, 0] = -5.0
    x, g = torch.ones(1, 1, 4, 4, dtype=torch.float64), torch.ones(1, 2, 3, 3, dtype=torch.float64)
    shapes = Shapes((1, 4, 4), (2, 3, 3))
    bound = layer.param_sensitivity(Norms(16), Norms(18, l2=float(g.norm())), shapes)
    found = layer.per_sample_grad(x, g)
    for name, grad in found.items():
        assert float(grad.detach().norm()) == pytest.approx(bound[name], rel=1e-12)


def test_annealing_keeps_the_certificate() -> None:
    layer = LinfDistanceConv2d(1, 2, 3, p=8)
    assert layer.refuses_certificate() is None
    layer.p = math.inf
    assert layer.row_norms() == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("bad", [{"groups": 2}, {"stride": 0}, {"p": 1.5}, {"init": "ones"}])
def test_bad_options(bad: dict) -> None:
    with pytest.raises(ConfigError):
        LinfDistanceConv2d(3, 4, 2, **bad)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="LinfDistanceConv2d"):
        LinfDistanceConv2d(3, 4, 2)(torch.zeros(2, 4, 5, 5))
