# SPDX-License-Identifier: Apache-2.0
"""Order-statistic neurons."""

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LinfDistance, LipschitzLayer, SortLinear
from dplip.testing import LayerContract


class TestGeometric(LayerContract):
    in_shape = (7,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return SortLinear.geometric(7, 4, rho=0.3)


class TestTruncated(LayerContract):
    in_shape = (12,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return SortLinear.geometric(12, 3, rho=0.7, truncation=9)


class TestTopK(LayerContract):
    in_shape = (6,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return SortLinear.top_k_mean(6, 4, 3)


class TestMean(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight"})

    def make(self) -> LipschitzLayer:
        return SortLinear.top_k_mean(5, 4, 5, bias=False)


class TestIncreasing(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight"})

    def make(self) -> LipschitzLayer:
        return SortLinear(5, 3, [0.1, 0.2, 0.6])


def test_geometric_weights() -> None:
    layer = SortLinear.geometric(20, 2, rho=0.5, truncation=3).double()
    torch.testing.assert_close(layer.order_weights, torch.tensor([4.0, 2.0, 1.0]).double() / 7, rtol=1e-6, atol=0)
    assert len(SortLinear.geometric(20, 2, rho=0.5, truncation=None).order_weights) == 20
    assert len(SortLinear.geometric(5, 2, rho=0.5).order_weights) == 5
    assert SortLinear.geometric(5, 2, rho=0.0).order_weights.tolist() == [1.0]


def test_rho_zero_is_the_linf_distance() -> None:
    sort, linf = SortLinear.geometric(5, 4, rho=0.0), LinfDistance(5, 4)
    linf.load_state_dict({"weight": sort.weight, "bias": sort.bias})
    x = torch.randn(10, 5)
    assert torch.equal(sort(x), linf(x))


@pytest.mark.parametrize(
    "weights",
    [[], [0.2] * 6, [-0.1, 0.5], [0.6, 0.5], [float("nan")], [float("inf")], [[0.5, 0.5]], [1.00001]],
    ids=str,
)
def test_order_weights_are_checked(weights: list) -> None:
    with pytest.raises(ConfigError, match="SortLinear: expected"):
        SortLinear(5, 2, weights)


@pytest.mark.parametrize(("rho", "truncation"), [(1.0, 3), (-0.1, 3), (float("nan"), 3), (0.5, 0)])
def test_geometric_options_are_checked(rho: float, truncation: int) -> None:
    with pytest.raises(ConfigError, match="0 <= rho < 1"):
        SortLinear.geometric(5, 2, rho, truncation)


@pytest.mark.parametrize("k", [0, 6])
def test_top_k_is_checked(k: int) -> None:
    with pytest.raises(ConfigError, match="1 <= k <= 5"):
        SortLinear.top_k_mean(5, 2, k)


def test_bounds_use_the_weights_as_stored() -> None:
    layer = SortLinear(3, 2, [0.4, 0.35, 0.25 + 9e-7])
    assert layer.row_norms().l1 == float(layer.order_weights.double().sum()) > 1


def test_one_input_and_more_than_25_order_statistics() -> None:
    """The original kernel stops at 25 and takes another path for one input; truncated weights still sum to 1."""
    one = SortLinear.geometric(1, 3, rho=0.3)
    x = torch.randn(4, 1)
    torch.testing.assert_close(one(x), (x - one.weight.T).abs() + one.bias)
    many = SortLinear.geometric(40, 2, rho=0.9, truncation=30).double()
    assert len(many.order_weights) == 30 and float(many.order_weights.sum()) == pytest.approx(1.0)
    x = torch.randn(4, 40, dtype=torch.float64)
    ordered = (x[:, None] - many.weight).abs().sort(descending=True)[0][..., :30]
    torch.testing.assert_close(many(x), ordered @ many.order_weights + many.bias)
