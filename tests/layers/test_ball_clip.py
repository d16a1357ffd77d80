# SPDX-License-Identifier: Apache-2.0
"""Projection onto a ball."""

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import BallClip, LipschitzLayer
from dplip.layers.base import Shapes
from dplip.testing import LayerContract


class TestBallClip(LayerContract):
    in_shape = (7,)

    def make(self) -> LipschitzLayer:
        return BallClip(1.5)


class TestImage(LayerContract):
    in_shape = (2, 2, 2)

    def make(self) -> LipschitzLayer:
        return BallClip(0.3)


class TestScalar(LayerContract):
    in_shape = (1,)

    def make(self) -> LipschitzLayer:
        return BallClip(2.0)


@pytest.mark.parametrize("n", [2, 9, 100])
def test_the_linf_constant_is_attained(n: int) -> None:
    """At the surface of the ball, one entry ``sin t`` and the rest equal, with ``tan 2t = sqrt(n - 1)``."""
    angle = 0.5 * torch.atan(torch.tensor(n - 1.0).double().sqrt())
    x = torch.zeros(1, n, dtype=torch.float64)
    x[0, 0], x[0, 1:] = angle.sin(), -angle.cos() / (n - 1) ** 0.5
    x = (1.5 * x * (1 + 1e-12)).requires_grad_()
    (row,) = torch.autograd.grad(BallClip(1.5)(x)[0, 0], x)
    claimed = BallClip(1.5).operator_norms(Shapes((n,), (n,))).inf_inf
    assert float(row.abs().sum()) == pytest.approx(claimed, rel=1e-6)
    assert claimed == pytest.approx((1 + n**0.5) / 2)


def test_it_is_the_projection() -> None:
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(BallClip(1.0)(x), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


@pytest.mark.parametrize("radius", [0.0, -1.0, float("inf"), float("nan")])
def test_radius_is_positive(radius: float) -> None:
    with pytest.raises(ConfigError, match="BallClip: expected"):
        BallClip(radius)
