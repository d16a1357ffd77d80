# SPDX-License-Identifier: Apache-2.0
"""Ramps and monotone residuals."""

import math

import pytest
import torch
from torch import Tensor, nn

from dplip.audit.sensitivity import search
from dplip.bounds import InputDomain, lipschitz, trace
from dplip.errors import ConfigError
from dplip.layers import GroupSort, LipschitzLayer, MonotoneResidual, NormalizedLinear, Ramp, Shapes
from dplip.losses import BinaryCrossEntropy, CrossEntropy
from dplip.testing import LayerContract

SIGNS = torch.tensor([[1.0, 0.0, -1.0, 1.0], [1.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])


class TestFixedRamp(LayerContract):
    in_shape = (4,)
    constraint = {"one_inf": 1.5}

    def make(self) -> LipschitzLayer:
        return Ramp(SIGNS, 1.5)


class TestCommonStrength(LayerContract):
    in_shape = (4,)

    def make(self) -> LipschitzLayer:
        return Ramp(SIGNS, 1.5, learned="common")


class TestStrengthPerFeature(LayerContract):
    in_shape = (4,)

    def make(self) -> LipschitzLayer:
        return Ramp(SIGNS, 1.5, learned="feature", least=0.5)


class TestAllOnes(LayerContract):
    in_shape = (4,)
    tight = frozenset({"strength"})

    def make(self) -> LipschitzLayer:
        return Ramp(torch.ones(1, 4), learned="common")


def chain(d: int, outputs: int = 1, ball: str = "entries", norm: float = 1.0) -> nn.Sequential:
    return nn.Sequential(
        NormalizedLinear(d, 8, ball=ball, max_norm=norm),
        GroupSort(2),
        NormalizedLinear(8, outputs, ball="rows_l1", max_norm=norm),
    )


def test_norms_of_the_ramp_are_those_of_the_table() -> None:
    d, m, strength = 5, 3, 0.7
    norms = Ramp(torch.ones(m, d), strength).double().operator_norms(Shapes((d,), (m,)))
    expected = [strength * v for v in (d, math.sqrt(d), math.sqrt(d * m), m, 1)]
    found = [norms.inf_inf, norms.two_inf, norms.two_two, norms.one_one, norms.one_inf]
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_wrapper_is_twice_as_steep_as_its_branch_and_says_so() -> None:
    model = MonotoneResidual(nn.Linear(1, 1, bias=False), torch.tensor([1]))
    with torch.no_grad():
        model.branch.weight.fill_(1.0)
    graph, x = trace(model), torch.tensor([[0.0], [1.0]])
    slope = float((model(x[1:]) - model(x[:1])).detach())
    assert slope == 2.0 <= lipschitz(graph, graph.evaluate(x)).linf <= 2.0 + 1e-6


@pytest.mark.parametrize("learned", ["common", "feature"])
@pytest.mark.parametrize("loss", [CrossEntropy(), BinaryCrossEntropy()])
def test_search_finds_no_gradient_above_the_bounds(learned: str, loss: nn.Module) -> None:
    model = MonotoneResidual(chain(4, 3), SIGNS, 3, learned=learned)
    found = search(model, InputDomain((4,), -1, 1), loss, weights=True, steps=20)
    for name, (norm, bound) in found.items():
        assert norm <= bound * (1 + 1e-9), name
    norm, bound = found["ramp.strength"]
    assert norm > 0.3 * bound


@pytest.mark.parametrize("learned", ["common", "feature"])
def test_projection_keeps_learned_strengths_at_their_least(learned: str) -> None:
    ramp = Ramp(SIGNS, 2.0, learned=learned, least=1.0)
    with torch.no_grad():
        ramp.strength.fill_(-5.0)
    ramp.project_()
    assert ramp.strength.tolist() == [1.0] * ramp.strength.numel()


def test_an_integer_strength_is_a_number_like_any_other() -> None:
    ramp = Ramp(torch.tensor([[1, -1]]), 2)
    y = ramp(torch.tensor([[0.25, 0.5]]))
    assert y.dtype == torch.float32
    assert y.tolist() == [[-0.5]]


def test_zero_strength_is_zero() -> None:
    assert Ramp(torch.ones(1, 3), 0.0)(torch.ones(2, 3)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("kind", ["common", "feature", None])
def test_state_and_type_follow_the_module(kind: str | None) -> None:
    model = MonotoneResidual(chain(3), torch.tensor([1, 0, -1]), learned=kind).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert model(x).dtype == torch.float64
    torch.testing.assert_close(model(x), model.branch(x) + (x[:, :1] - x[:, 2:]))


@pytest.mark.parametrize(
    ("directions", "outputs"),
    [
        (torch.tensor([1]), 2),  # one sign for four inputs would broadcast
        (torch.tensor([[1, 0, 0, 1]]), 2),
        (torch.tensor([1, 0.5, 0, 0]), 1),
        (torch.tensor(1.0), 1),
    ],
)
def test_wrong_directions_are_refused(directions: Tensor, outputs: int) -> None:
    with pytest.raises((ConfigError, ValueError)):
        MonotoneResidual(chain(4, outputs), directions, outputs)(torch.zeros(2, 4))


@pytest.mark.parametrize(
    "options", [{"strength": -1.0}, {"strength": math.inf}, {"learned": "all"}, {"least": 2.0}, {"strength": math.nan}]
)
def test_wrong_strengths_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Ramp(SIGNS, **options)  # type: ignore[arg-type]
