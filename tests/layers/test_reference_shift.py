# SPDX-License-Identifier: Apache-2.0
"""The reference shift around layers with and without parameters."""

import pytest
import torch
from torch import nn

from dplip.errors import ConfigError
from dplip.layers import LinearSpline, LinfDistance, LipschitzLayer, NormalizedLinear, ReferenceShift
from dplip.testing import LayerContract


class TestDistance(LayerContract):
    in_shape = (5,)
    tight = frozenset({"layer.weight"})

    def make(self) -> LipschitzLayer:
        return ReferenceShift(LinfDistance(5, 4), 0.5)


class TestLinear(LayerContract):
    in_shape = (5,)
    tight = frozenset({"layer.weight"})

    def make(self) -> LipschitzLayer:
        return ReferenceShift(NormalizedLinear(5, 4), torch.linspace(0, 1, 5))


class TestSpline(LayerContract):
    in_shape = (2, 3)

    def make(self) -> LipschitzLayer:
        return ReferenceShift(LinearSpline(2, intervals=4))


def test_the_reference_is_mapped_to_zero_and_carries_no_gradient() -> None:
    inner = LinfDistance(5, 4)
    layer = ReferenceShift(inner, 0.5)
    assert not layer(torch.full((3, 5), 0.5)).any()
    x = torch.rand(3, 5)
    expected = torch.autograd.grad(inner(x).sum(), list(inner.parameters()))
    for got, want in zip(torch.autograd.grad(layer(x).sum(), list(inner.parameters())), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_activations_stay_in_the_inputs_ball() -> None:
    net = nn.Sequential(ReferenceShift(LinfDistance(5, 6, init_scale=9.0), 0.5), ReferenceShift(LinfDistance(6, 4)))
    x = torch.rand(100, 5)
    assert bool((net(x).abs().amax(1) <= (x - 0.5).abs().amax(1) + 1e-5).all())


@pytest.mark.parametrize("reference", [float("nan"), torch.tensor([0.0, float("inf")])])
def test_references_are_finite(reference: float | torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="finite reference"):
        ReferenceShift(LinfDistance(2, 2), reference)


def test_only_layers_with_bounds_are_wrapped() -> None:
    with pytest.raises(ConfigError, match="got Linear"):
        ReferenceShift(nn.Linear(2, 2))


@pytest.mark.parametrize("reference", [0.5, torch.rand(3)])
def test_the_reference_follows_its_layer_to_another_device(reference: float | torch.Tensor) -> None:
    assert ReferenceShift(LinfDistance(3, 2).to("meta"), reference).reference.device.type == "meta"
