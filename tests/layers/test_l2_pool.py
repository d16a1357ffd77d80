# SPDX-License-Identifier: Apache-2.0
"""l_2-norm pooling."""

import math

import pytest
import torch

from dplip.bounds import InputDomain, forward, input_like, trace
from dplip.errors import ConfigError
from dplip.layers import L2Pool2d, LipschitzLayer, Shapes
from dplip.testing import LayerContract


class TestDisjoint(LayerContract):
    in_shape = (2, 4, 4)

    def make(self) -> LipschitzLayer:
        return L2Pool2d(2)


class TestOverlapping(LayerContract):
    in_shape = (1, 5, 4)

    def make(self) -> LipschitzLayer:
        return L2Pool2d(3, 1, 1)


class TestEps(LayerContract):
    in_shape = (1, 5, 5)

    def make(self) -> LipschitzLayer:
        return L2Pool2d((2, 3), (2, 1), eps=0.09)


def test_values_are_the_definition() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = (torch.nn.functional.avg_pool2d(x**2, 3, 1) * 9 + 0.25).sqrt()
    torch.testing.assert_close(L2Pool2d(3, 1, eps=0.25)(x), expected)


def test_tiles_keep_the_norm() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(L2Pool2d(2)(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


def test_overlap_counts_energy_more_than_once() -> None:
    pool = L2Pool2d(3, 1)
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2] = 1.0
    assert float(pool(x).norm()) == pytest.approx(pool.operator_norms(Shapes((1, 5, 5), (1, 3, 3))).two_two) == 3.0


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_squares_neither_vanish_nor_overflow(scale: float) -> None:
    x = torch.full((1, 1, 2, 2), scale, dtype=torch.float64, requires_grad=True)
    y = L2Pool2d(2)(x)
    y.sum().backward()
    assert y.item() == pytest.approx(2 * scale) and torch.allclose(x.grad, torch.full_like(x, 0.5))


def test_zero_window_has_a_finite_gradient() -> None:
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    L2Pool2d(2)(x).sum().backward()
    assert float(x.grad.abs().max()) == 0.0


def test_eps_enters_the_activation_bound() -> None:
    """A dark image leaves the pool with norm sqrt(outputs eps), which the magnitude must cover."""
    pool, domain = L2Pool2d(2, eps=0.25), InputDomain((1, 4, 4), 0.0, 1.0, reference=0.0)
    graph = trace(pool)
    states = forward(graph, domain, input_like(pool, domain))
    magnitude = states[graph.output].magnitude
    assert magnitude.l2 >= math.sqrt(4 * 0.25) + 4 - 1e-9
    bright = pool(torch.ones(1, 1, 4, 4))
    assert float(bright.norm()) <= magnitude.l2 and float(bright.max()) <= magnitude.linf


def test_bad_eps() -> None:
    with pytest.raises(ConfigError, match="eps"):
        L2Pool2d(2, eps=-1.0)
