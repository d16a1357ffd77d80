# SPDX-License-Identifier: Apache-2.0
"""Re-estimation of running means for the deployed network."""

import math

import pytest
import torch
from torch import nn

from dplip.errors import ConfigError, DataError
from dplip.layers import LinfDistance, MeanShift, StochasticSortLinear
from dplip.recipes import reestimate_means


def test_means_are_those_of_the_deployed_network_over_all_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LinfDistance(4, 6, p=8), MeanShift(6), StochasticSortLinear(6, 3, 0.5, p=8), MeanShift(3))
    model.train()
    model[2].eval()
    x = torch.rand(50, 4)
    model(torch.rand(9, 4))  # leaves something to forget
    reestimate_means(model, x.split(16))
    assert (model[0].p, model[1].momentum) == (8, 0.1)
    assert (model.training, model[1].training, model[2].training) == (True, True, False)
    model.eval()
    model[0].p = math.inf
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0).detach())
    batches = [model[0](b) - model[0](b).mean(0) for b in x.split(16)]
    second = torch.cat([model[2](b) for b in batches]).mean(0)
    torch.testing.assert_close(model[3].running_mean, second.detach())


def test_nothing_to_estimate_is_refused() -> None:
    with pytest.raises(ConfigError, match="MeanShift"):
        reestimate_means(LinfDistance(4, 6), [torch.rand(2, 4)])
    layer = MeanShift(4)
    with pytest.raises(DataError, match="one or more"):
        reestimate_means(layer, [torch.rand(0, 4)])
    assert layer.training
