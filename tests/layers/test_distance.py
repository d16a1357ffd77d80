# SPDX-License-Identifier: Apache-2.0
"""What every distance layer shares; the bounds themselves are tested on its concrete classes."""

import math

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LinfDistance, LinfDistanceConv2d, Shapes, SortConv2d, SortLinear, StochasticSortLinear
from dplip.layers.distance import INITS, DistanceLayer


@pytest.mark.parametrize("init", INITS)
def test_initial_weights(init):
    torch.manual_seed(0)
    weight = LinfDistance(40, 50, init=init, init_scale=2.0).weight.detach() / 2
    if init == "normal":
        assert abs(weight.mean()) < 0.1 and abs(weight.std() - 1) < 0.1
    elif init == "uniform":
        assert 0 <= weight.min() < 0.05 and 0.95 < weight.max() <= 1
    elif init == "templates":
        assert set(weight.unique().tolist()) == {0.0, 1.0} and 0.4 < weight.mean() < 0.6


def test_norms_follow_from_the_rows():
    layer = LinfDistance(9, 4, p=4.0)
    k = layer.row_norms()
    norms = layer.operator_norms(Shapes((9,), (4,)))
    assert (norms.inf_inf, norms.two_inf, norms.one_inf) == (k.l1, k.l2, k.linf)
    assert norms.two_two == pytest.approx(math.sqrt(4) * k.l2) and norms.one_one == pytest.approx(4 * k.linf)
    assert k.l1 == 1 and k.l2 == pytest.approx(9 ** (-1 / 4))


@pytest.mark.parametrize("arguments", [{"init": "zeros"}, {"in_features": 0}, {"out_features": -1}])
def test_bad_arguments(arguments):
    with pytest.raises(ConfigError):
        LinfDistance(**({"in_features": 3, "out_features": 2} | arguments))


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 3), (3,)])
def test_wrong_inputs(shape):
    with pytest.raises(ValueError, match=r"\[B, I\]"):
        LinfDistance(3, 2)(torch.zeros(shape))


def selections() -> list[DistanceLayer]:
    return [
        LinfDistance(8, 5),
        SortLinear.geometric(8, 5, 0.3),
        StochasticSortLinear(8, 5, keep=0.7),
        LinfDistanceConv2d(2, 5, 2),
        SortConv2d.geometric(2, 5, 2, 0.3),
    ]


@pytest.mark.parametrize("layer", selections(), ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_only_where_asked_for_and_only_in_training(layer: DistanceLayer, dtype: torch.dtype) -> None:
    x = 3 + 0.01 * torch.randn((6, 2, 2, 2) if hasattr(layer, "window") else (6, 8))
    with torch.no_grad():
        layer.weight.mul_(0.01)
    for half in (False, True):
        layer.half_training = half
        for training in (False, True):
            layer.train(training)
            exact = layer(x)
            with torch.autocast("cpu", dtype):
                y = layer(x)
                assert torch.equal(layer(x.to(dtype)), layer(x.to(dtype).float()))
            assert y.dtype == torch.float32
            assert torch.equal(y, exact) is not (half and training)


def test_weights_get_float32_gradients_from_half_precision_selections() -> None:
    layer = LinfDistance(8, 5)
    layer.half_training = True
    x, g = torch.randn(300, 8), torch.full((300, 5), 1 + 2**-13)  # no float16 number
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    (y * g).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    multiples = layer.weight.grad / g[0, 0]
    torch.testing.assert_close(multiples, multiples.round(), rtol=1e-5, atol=1e-5)


def test_half_precision_inputs_without_autocast_are_refused() -> None:
    with pytest.raises(ValueError, match="one floating dtype"):
        LinfDistance(3, 2)(torch.zeros(1, 3, dtype=torch.float16))
