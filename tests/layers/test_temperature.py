# SPDX-License-Identifier: Apache-2.0
"""A learned positive scale."""

import pytest
import torch
from torch import nn

from dplip.certify import certify
from dplip.errors import ConfigError
from dplip.layers import LearnedScale, LipschitzLayer, MaxMin, NormalizedLinear, PositionBias
from dplip.testing import LayerContract


class TestLearnedScale(LayerContract):
    in_shape = (5,)
    tight = frozenset({"scale"})

    def make(self) -> LipschitzLayer:
        return LearnedScale(2.5)


class TestLearnedScaleOfImages(LayerContract):
    in_shape = (2, 3)
    tight = frozenset({"scale"})
    constraint = {"inf_inf": 4.0}

    def make(self) -> LipschitzLayer:
        return LearnedScale(2.5, upper=4.0)


@pytest.mark.parametrize("value", [-3.0, 0.0, 7.0])
def test_projection_keeps_the_scale_positive(value: float) -> None:
    layer = LearnedScale(1.0, lower=0.5, upper=2.0)
    with torch.no_grad():
        layer.scale.fill_(value)
    layer.project_()
    assert 0.5 <= float(layer.scale.detach()) <= 2.0


@pytest.mark.parametrize("arguments", [(0.0, 0.0, 1.0), (1.0, 2.0, 3.0), (float("nan"), 0.1, 1.0)])
def test_bad_arguments_are_refused(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError):
        LearnedScale(*arguments)


@pytest.mark.parametrize("scale", [0.02, 50.0])
def test_a_temperature_does_not_change_a_certified_radius(scale: float) -> None:
    model = nn.Sequential(NormalizedLinear(4, 4), MaxMin(), NormalizedLinear(4, 3))
    x = torch.randn(10, 4)
    plain = certify(model.eval(), x, "l2", method="margin")
    scaled = certify(nn.Sequential(*model, LearnedScale(scale), PositionBias(3)).eval(), x, "l2", method="margin")
    assert torch.equal(plain.predicted, scaled.predicted)
    assert float(plain.radius.max()) > 0.1
    torch.testing.assert_close(scaled.radius, plain.radius, rtol=1e-4, atol=1e-5)
