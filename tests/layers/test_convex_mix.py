# SPDX-License-Identifier: Apache-2.0
"""A residual branch with a learned weight."""

import pytest
import torch
from torch import nn

from dplip.audit.sensitivity import search
from dplip.bounds import InputDomain, lipschitz, trace
from dplip.errors import ConfigError
from dplip.layers import ConvexMix, LipschitzLayer, MaxMin, NormalizedLinear, Share
from dplip.losses import CrossEntropy
from dplip.testing import LayerContract


class TestTake(LayerContract):
    in_shape = (5,)
    tight = frozenset({"mix"})
    parameter_draws = ("initial", "random", "random2", "large", "zero")

    def make(self) -> LipschitzLayer:
        return Share(nn.Parameter(torch.tensor([0.3])))


class TestKeep(LayerContract):
    in_shape = (2, 3)
    tight = frozenset({"mix"})
    parameter_draws = ("initial", "random", "random2", "large", "zero")

    def make(self) -> LipschitzLayer:
        return Share(nn.Parameter(torch.tensor([0.3])), complement=True)


def mixed(a: float) -> ConvexMix:
    return ConvexMix(nn.Sequential(NormalizedLinear(4, 4), MaxMin()), a).double()


@pytest.mark.parametrize("a", [0.0, 0.25, 1.0])
def test_a_contraction_mixed_in_stays_a_contraction(a: float) -> None:
    model = mixed(a)
    graph = trace(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert lipschitz(graph, graph.evaluate(x)).l2 == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(model(x), (1 - a) * x + a * model.branch(x))


@pytest.mark.parametrize("a", [0.1, 0.7])
def test_search_finds_no_gradient_above_the_bounds(a: float) -> None:
    model = nn.Sequential(mixed(a), mixed(1 - a), NormalizedLinear(4, 3).double())
    found = search(model, InputDomain((4,), -1, 1), CrossEntropy(), weights=True, steps=20)
    assert {"0.keep.mix", "1.keep.mix"} <= set(found)
    for name, (norm, bound) in found.items():
        assert norm <= bound * (1 + 1e-9), name
    assert max(norm / bound for norm, bound in found.values()) > 0.5


def test_both_shares_are_one_parameter_and_projection_keeps_it_in_the_unit_interval() -> None:
    model = mixed(0.5)
    assert [n for n, _ in model.named_parameters()].count("keep.mix") == 1
    assert model.keep.mix is model.take.mix
    with torch.no_grad():
        model.keep.mix.fill_(3.0)
    model.keep.project_()
    assert float(model.take.mix.detach()) == 1.0


@pytest.mark.parametrize("a", [-0.1, 1.1, float("nan")])
def test_weights_outside_the_unit_interval_are_refused(a: float) -> None:
    with pytest.raises(ConfigError):
        ConvexMix(MaxMin(), a)
