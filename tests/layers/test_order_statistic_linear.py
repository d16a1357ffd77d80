# SPDX-License-Identifier: Apache-2.0
"""Signed order-statistic neurons and the layers that are special cases of them."""

import itertools

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LinfDistance, LipschitzLayer, MaxMin, OrderStatisticLinear, SortLinear
from dplip.testing import LayerContract


class TestSigned(LayerContract):
    in_shape = (5,)

    def make(self) -> LipschitzLayer:
        return OrderStatisticLinear(5, 3, [[0.5, -0.5, 0.0], [0.2, 0.3, -0.4], [0.0, 0.0, 1.0]])


class TestShared(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return OrderStatisticLinear(5, 3, [0.5, -0.5])


class TestPlain(LayerContract):
    in_shape = (4,)

    def make(self) -> LipschitzLayer:
        return OrderStatisticLinear(4, 3, [0.6, 0.0, 0.0, -0.4], magnitude=False, bias=False)


class TestLearned(LayerContract):
    in_shape = (4,)
    constraint = {"inf_inf": 1.0}

    def make(self) -> LipschitzLayer:
        return OrderStatisticLinear(4, 3, [0.6, 0.2, -0.2], learned=True)


X = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("c", [[1.0], [0.5, 0.3, 0.2], [1 / 6] * 6])
def test_non_negative_shared_weights_are_sort_linear(c: list[float]) -> None:
    sort = SortLinear(6, 4, c).double()
    ours = OrderStatisticLinear(6, 4, c).double()
    ours.load_state_dict(sort.state_dict() | {"order_weights": sort.order_weights.expand(4, -1)})
    torch.testing.assert_close(ours(X), sort(X))
    assert ours.row_norms() == pytest.approx(sort.row_norms())
    for got, expected in zip(ours.interval(X - 0.3, X + 0.1), sort.interval(X - 0.3, X + 0.1), strict=True):
        torch.testing.assert_close(got, expected)


def test_one_weight_is_the_linf_distance() -> None:
    linf = LinfDistance(6, 4).double()
    ours = OrderStatisticLinear(6, 4, [1.0]).double()
    ours.load_state_dict(linf.state_dict() | {"order_weights": ours.order_weights})
    torch.testing.assert_close(ours(X), linf(X))


def test_maxmin_is_a_special_case() -> None:
    reach = float(X.abs().max())
    layer = OrderStatisticLinear.maxmin(6, reach).double()
    torch.testing.assert_close(layer(X), MaxMin()(X))
    norms = layer.row_norms()
    assert (norms.l1, norms.l2, norms.linf) == (1.0, 1.0, 1.0)


def test_interval_is_exact_for_one_sign_and_sound_for_two() -> None:
    torch.manual_seed(0)
    lower = torch.randn(1, 4, dtype=torch.float64)
    upper = lower + torch.rand(1, 4, dtype=torch.float64)
    grid = lower + (upper - lower) * torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
    points = torch.tensor(list(itertools.product(*grid.T.tolist())), dtype=torch.float64)
    for c, exact in (([-0.3, -0.5], True), ([0.3, 0.5], True), ([0.5, -0.5], False)):
        layer = OrderStatisticLinear(4, 5, c, magnitude=False, bias=False).double()
        low, high = layer.interval(lower, upper)
        y = layer(points)
        assert bool((y >= low - 1e-12).all()) and bool((y <= high + 1e-12).all())
        if exact:
            torch.testing.assert_close(y.amin(0, True), low)
            torch.testing.assert_close(y.amax(0, True), high)


@pytest.mark.parametrize("c", [[0.8, -0.3], [float("nan")], [[1.0], [1.0]], [0.1] * 7])
def test_wrong_weights_are_refused(c: object) -> None:
    with pytest.raises(ConfigError, match="OrderStatisticLinear"):
        OrderStatisticLinear(6, 4, c)


def test_maxmin_refuses_an_odd_width() -> None:
    with pytest.raises(ConfigError, match="even width"):
        OrderStatisticLinear.maxmin(5, 1.0)
