# SPDX-License-Identifier: Apache-2.0
"""l_inf-distance neurons and their power-mean relaxation."""

import math

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LinfDistance, LipschitzLayer
from dplip.layers.base import Shapes
from dplip.norms import Norms
from dplip.testing import LayerContract


class TestLinf(LayerContract):
    in_shape = (6,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return LinfDistance(6, 4)


class TestPowerMean8(LayerContract):
    in_shape = (6,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return LinfDistance(6, 4, p=8)


class TestPowerMean2(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return LinfDistance(5, 3, p=2, init="uniform")


class TestPowerMean1000(LayerContract):
    in_shape = (5,)

    def make(self) -> LipschitzLayer:
        return LinfDistance(5, 3, p=1000, bias=False)


class TestPlain(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return LinfDistance(5, 3, p=4, power_mean=False)


class TestOneByOne(LayerContract):
    in_shape = (1,)

    def make(self) -> LipschitzLayer:
        return LinfDistance(1, 1, bias=False, init="templates")


def test_values_by_hand() -> None:
    layer = LinfDistance(4, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
        layer.bias.fill_(10.0)
    x = torch.zeros(1, 4, dtype=torch.float64)
    for p, value in ((math.inf, 13.0), (2, 10 + (14 / 4) ** 0.5), (3, 10 + (36 / 4) ** (1 / 3))):
        layer.p = p
        assert float(layer(x).detach()) == pytest.approx(value)
    layer.power_mean, layer.p = False, 2
    assert float(layer(x).detach()) == pytest.approx(10 + 14**0.5)


def test_bounds_follow_p() -> None:
    """The plain distance multiplies cotangents by d^(1/p) while p is finite; the power mean never does."""
    layer, plain, shapes = LinfDistance(16, 3), LinfDistance(16, 3, power_mean=False), Shapes((16,), (3,))
    g = Norms(3, l1=2.0, l2=1.5)
    for p, gain, norm in ((math.inf, 1.0, 1.0), (4, 2.0, 0.5), (2, 4.0, 0.25)):
        layer.p = plain.p = p
        assert layer.param_sensitivity(Norms(16), g, shapes)["weight"] == pytest.approx(1.5 * norm)
        assert plain.param_sensitivity(Norms(16), g, shapes)["weight"] == pytest.approx(1.5)
        assert layer.cotangent_bound(g, shapes).l1 == pytest.approx(2.0)
        assert plain.cotangent_bound(g, shapes).l1 == pytest.approx(2.0 * gain)


def test_only_the_deployed_function_is_certified() -> None:
    assert LinfDistance(3, 2).refuses_certificate() is None
    assert LinfDistance(3, 2, p=8).refuses_certificate() is None
    assert LinfDistance(3, 2, power_mean=False).refuses_certificate() is None
    assert "p = 8" in LinfDistance(3, 2, p=8, power_mean=False).refuses_certificate()


@pytest.mark.parametrize("init", ["normal", "uniform", "templates"])
def test_initial_weights(init: str) -> None:
    weight = LinfDistance(50, 40, init=init, init_scale=2.0).weight.detach()
    if init == "templates":
        assert set(weight.unique().tolist()) == {0.0, 2.0}
    elif init == "uniform":
        assert 0 <= float(weight.min()) < 0.1 and 1.9 < float(weight.max()) <= 2
    else:
        assert float(weight.std()) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    "options",
    [{"in_features": 0}, {"out_features": 0}, {"init": "zeros"}, {"p": 1.5}, {"p": math.nan}, {"p": -math.inf}],
    ids=str,
)
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ConfigError, match="LinfDistance: expected"):
        LinfDistance(**{"in_features": 3, "out_features": 2} | options)
    if "p" in options:
        with pytest.raises(ConfigError, match="2 <= p"):
            LinfDistance(3, 2).p = options["p"]


def test_shapes_are_checked() -> None:
    for p in (math.inf, 4):
        for x in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3).double()):
            with pytest.raises(ValueError, match="expected"):
                LinfDistance(3, 2, p=p)(x)


@pytest.mark.parametrize("p", [math.inf, 8.0])
def test_views_are_read_as_they_are_and_templates_that_equal_the_input_are_finite(p: float) -> None:
    """The original kernels read any layout as contiguous, and its fallback returns NaN where ``x == w``."""
    layer = LinfDistance(6, 5, p=p).double()
    wide = torch.randn(6, 7, dtype=torch.float64)
    for view in (wide.T, torch.randn(7, 12, dtype=torch.float64)[:, ::2], wide[:, :1].T.expand(7, 6)):
        assert not view.is_contiguous()
        torch.testing.assert_close(layer(view), layer(view.contiguous()), rtol=1e-14, atol=0)
    x = layer.weight.detach()[:1].clone().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y[0, 0].item() == layer.bias[0].item()
    assert bool(torch.isfinite(x.grad).all()) and bool(torch.isfinite(layer.weight.grad).all())


@pytest.mark.parametrize("p", [2.0, 8.0, 7.5, math.inf])
@pytest.mark.parametrize("power_mean", [False, True])
def test_norms_of_weight_gradients_need_no_gradients(p: float, power_mean: bool) -> None:
    layer = LinfDistance(6, 4, p=p, power_mean=power_mean).double()
    x, g = torch.randn(7, 6).double(), torch.randn(7, 4).double()
    w = layer.weight.detach()
    x[0] = w[1]  # a gradient of 0
    expected = torch.linalg.vector_norm(layer.per_sample_weight_grad(x, w, g).flatten(1), dim=1)
    torch.testing.assert_close(layer.weight_grad_norm(x, w, g), expected)
