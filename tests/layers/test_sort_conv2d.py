# SPDX-License-Identifier: Apache-2.0
"""Order-statistic neurons over windows."""

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LinfDistanceConv2d, LipschitzLayer, SortConv2d, SortLinear
from dplip.testing import LayerContract


class TestGeometric(LayerContract):
    in_shape = (1, 4, 4)

    def make(self) -> LipschitzLayer:
        return SortConv2d.geometric(1, 2, 3, rho=0.3, padding=1)


class TestTopKStridedGroups(LayerContract):
    in_shape = (4, 3, 3)
    parameter_draws = ("initial", "large", "tied")

    def make(self) -> LipschitzLayer:
        return SortConv2d.top_k_mean(4, 4, 2, k=3, stride=2, padding=1, groups=2, bias=False)


class TestOneWindow(LayerContract):
    in_shape = (1, 3, 2)
    parameter_draws = ("initial", "large", "tied")
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return SortConv2d(1, 3, (3, 2), [0.5, 0.3, 0.1])


def test_one_order_statistic_is_the_linf_distance() -> None:
    torch.manual_seed(0)
    sort, linf = SortConv2d(2, 3, 2, [1.0], stride=2).double(), LinfDistanceConv2d(2, 3, 2, stride=2).double()
    linf.load_state_dict(sort.state_dict(), strict=False)
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    assert torch.equal(sort(x), linf(x))


def test_weights_are_those_of_the_dense_layer() -> None:
    conv = SortConv2d.geometric(4, 2, 3, rho=0.7, truncation=None, groups=2)
    assert torch.equal(conv.order_weights, SortLinear.geometric(18, 2, rho=0.7, truncation=None).order_weights)
    assert torch.equal(SortConv2d.top_k_mean(1, 2, 2, k=4).order_weights, torch.full((4,), 0.25))


@pytest.mark.parametrize("k", [0, 5])
def test_bad_k(k: int) -> None:
    with pytest.raises(ConfigError, match="top-k"):
        SortConv2d.top_k_mean(1, 2, 2, k=k)


def test_bad_weights() -> None:
    with pytest.raises(ConfigError, match="SortConv2d"):
        SortConv2d(1, 2, 2, [0.9, 0.9])
