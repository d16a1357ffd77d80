# SPDX-License-Identifier: Apache-2.0
"""Mean shift: a constant in evaluation, refused wherever examples would mix."""

import pytest
import torch
from torch import nn

from dplip.bounds import InputDomain, trace
from dplip.certify import certify
from dplip.errors import ConfigError, MixesExamplesError, UnsoundCertificate
from dplip.layers import LinfDistance, LipschitzLayer, MeanShift, ReferenceShift, Scale, Shapes
from dplip.losses import CrossEntropy
from dplip.privacy.sensitivity import StepSensitivity
from dplip.testing import LayerContract


def frozen(channels: int) -> MeanShift:
    layer = MeanShift(channels).eval()
    layer.running_mean.copy_(torch.linspace(-1, 2, channels))
    return layer


class TestVector(LayerContract):
    in_shape = (5,)

    def make(self) -> LipschitzLayer:
        return frozen(5)


class TestImage(LayerContract):
    in_shape = (2, 3, 2)

    def make(self) -> LipschitzLayer:
        return frozen(2)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LinfDistance(4, 6, bias=False), MeanShift(6), LinfDistance(6, 3), Scale(-1.0))


def test_training_subtracts_the_batch_mean_over_positions() -> None:
    layer, x = MeanShift(3, momentum=0.25), torch.randn(5, 3, 2, 4)
    mean = x.mean((0, 2, 3))
    torch.testing.assert_close(layer(x), x - mean.view(1, 3, 1, 1))
    torch.testing.assert_close(layer.running_mean, 0.25 * mean)
    layer(x[:0])
    torch.testing.assert_close(layer.running_mean, 0.25 * mean)


def test_bounds_refuse_batch_means_and_name_the_replacement() -> None:
    model = net()
    for at in (model, nn.Sequential(ReferenceShift(model[1])), model[1], ReferenceShift(model[1])):
        with pytest.raises(MixesExamplesError, match="ReferenceShift"):
            trace(at)
        trace(at.eval())
        at.train()
    with pytest.raises(MixesExamplesError, match="ReferenceShift"):
        model[1].operator_norms(Shapes((6,), (6,)))


@pytest.mark.parametrize("training", [True, False])
def test_private_training_refuses_in_either_mode(training: bool) -> None:
    model = net().train(training)
    with pytest.raises(MixesExamplesError, match="ReferenceShift"):
        StepSensitivity(model, InputDomain((4,), 0, 1), CrossEntropy())


def test_certificate_needs_evaluation_mode() -> None:
    model, x = net().double(), torch.rand(8, 4, dtype=torch.float64)
    with pytest.raises(UnsoundCertificate, match=r"model\.eval"):
        certify(model, x)
    model(x)  # sets the running mean
    model.eval()
    logits = model(x)
    top = logits.topk(2, dim=1)[0]
    expected = (top[:, 0] - top[:, 1]) / 2
    torch.testing.assert_close(certify(model, x, method="margin").radius, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("channels", "momentum"), [(0, 0.1), (3, 0.0), (3, 1.1), (3, float("nan"))])
def test_options_out_of_range(channels: int, momentum: float) -> None:
    with pytest.raises(ConfigError, match="MeanShift"):
        MeanShift(channels, momentum)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, \*\]"):
        MeanShift(3)(torch.zeros(2, 4))
