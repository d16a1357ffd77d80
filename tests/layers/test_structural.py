# SPDX-License-Identifier: Apache-2.0
"""Layers that move or shift values."""

import pytest
import torch
from torch import nn

from dplip.errors import ConfigError
from dplip.layers import Flatten, LipschitzLayer, Reshape, Residual, Shift
from dplip.testing import LayerContract


class TestFlatten(LayerContract):
    in_shape = (2, 3)

    def make(self) -> LipschitzLayer:
        return Flatten()


class TestReshape(LayerContract):
    in_shape = (6,)

    def make(self) -> LipschitzLayer:
        return Reshape(2, -1)


class TestShift(LayerContract):
    in_shape = (4,)

    def make(self) -> LipschitzLayer:
        return Shift(torch.linspace(-1, 2, 4))


class TestShiftByNumber(LayerContract):
    in_shape = (2, 2)

    def make(self) -> LipschitzLayer:
        return Shift(0.3)


@pytest.mark.parametrize("mix", [None, 0.0, 0.25, 1.0])
def test_residual_values(mix: float | None) -> None:
    x, branch = torch.randn(3, 4), nn.Linear(4, 4)
    expected = x + branch(x) if mix is None else (1 - mix) * x + mix * branch(x)
    torch.testing.assert_close(Residual(branch, mix)(x), expected)


@pytest.mark.parametrize("mix", [-0.1, 1.1, float("nan")])
def test_mixtures_are_convex(mix: float) -> None:
    with pytest.raises(ConfigError, match="0 <= mix <= 1"):
        Residual(nn.Identity(), mix)


@pytest.mark.parametrize("offset", [float("nan"), torch.tensor([1.0, float("inf")])])
def test_offsets_are_finite(offset: float | torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="finite offset"):
        Shift(offset)


@pytest.mark.parametrize(
    ("offset", "x"),
    [
        (torch.zeros(5), torch.zeros(3, 1)),
        (torch.zeros(3, 4), torch.zeros(3, 4)),
        (torch.zeros(1, 4), torch.zeros(3, 4)),
        (torch.zeros(3), torch.zeros(3)),
    ],
    ids=["widens", "batch", "batch of one", "one number an example"],
)
def test_offsets_neither_widen_an_example_nor_reach_the_batch_axis(offset: torch.Tensor, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Shift: expected an offset for examples"):
        Shift(offset)(x)


def test_reshapes_keep_the_entries() -> None:
    assert Reshape(2, -1)(torch.zeros(0, 6)).shape == (0, 2, 3)
    assert Flatten()(torch.zeros(3, 2, 2)).shape == (3, 4)
    with pytest.raises(RuntimeError):
        Reshape(4)(torch.zeros(2, 6))


def test_an_empty_batch_keeps_the_graph() -> None:
    x = torch.zeros(0, 2, 3, requires_grad=True)
    Flatten()(x).sum().backward()
    assert x.grad.shape == (0, 2, 3)
