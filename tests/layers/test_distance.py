# SPDX-License-Identifier: Apache-2.0
"""What every distance layer shares; the bounds themselves are tested on its concrete classes."""

import math

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LinfDistance, Shapes
from dplip.layers.distance import INITS


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
