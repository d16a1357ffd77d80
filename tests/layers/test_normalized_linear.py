# SPDX-License-Identifier: Apache-2.0
"""Affine layers in a norm ball."""

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LipschitzLayer, NormalizedLinear
from dplip.layers.base import Shapes
from dplip.testing import LayerContract


class TestSpectral(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="spectral")


class TestFrobenius(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="frobenius")


class TestRowsL1(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"inf_inf": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="rows_l1")


class TestColumnsL1(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"one_one": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="columns_l1")


class TestTall(LayerContract):
    in_shape = (3,)
    tight = frozenset({"weight"})
    constraint = {"two_two": 0.5}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(3, 6, max_norm=0.5, bias=False)


class TestRowsL2(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"two_inf": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="rows_l2")


class TestEntries(LayerContract):
    in_shape = (5,)
    tight = frozenset({"weight", "bias"})
    constraint = {"one_inf": 1.0}

    def make(self) -> LipschitzLayer:
        return NormalizedLinear(5, 4, ball="entries")


def test_float32_rows_never_leave_the_l2_ball() -> None:
    torch.manual_seed(3)
    layer = NormalizedLinear(37, 500, ball="rows_l2")
    with torch.no_grad():
        layer.weight.normal_(0, 10)
    layer.project_()
    norms = torch.linalg.vector_norm(layer.weight.detach(), dim=1, dtype=torch.float64)
    assert 1 - 1e-5 < float(norms.amin()) <= float(norms.amax()) <= 1.0


@pytest.mark.parametrize(("ball", "axis"), [("rows_l1", 2), ("columns_l1", 1), ("frobenius", None)])
def test_projection_is_the_nearest_point(ball: str, axis: int | None) -> None:
    """Variational inequality: no point of the ball lies on the far side of the projection."""
    layer = NormalizedLinear(5, 4, ball=ball, max_norm=0.8).double()
    before = torch.randn(4, 5, dtype=torch.float64)
    layer.weight.data = before.clone()
    layer.project_()
    after = layer.weight.detach()
    for scale in (0.01, 0.3, 1.0):
        other = after + scale * torch.randn(500, 4, 5, dtype=torch.float64)
        size = other.abs().sum(axis, keepdim=True) if axis else other.norm(dim=(1, 2), keepdim=True)
        other = other * (0.8 / size).clamp_max(1)
        assert float(((before - after) * (other - after)).sum((1, 2)).max()) <= 1e-9


@pytest.mark.parametrize("scale", [1e3, 1e8])
@pytest.mark.parametrize("ball", ["rows_l1", "columns_l1"])
def test_projection_of_large_float32_weights(ball: str, scale: float) -> None:
    layer = NormalizedLinear(50, 3, ball=ball)
    layer.weight.data = torch.randn(3, 50) * scale
    layer.project_()
    sums = layer.weight.detach().double().abs().sum(1 if ball == "rows_l1" else 0)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
def test_bjorck_orthogonalises(shape: tuple[int, int]) -> None:
    layer = NormalizedLinear(shape[1], shape[0], orthogonalize=25, max_norm=2.0)
    layer.weight.data = torch.randn(shape)
    layer.project_()
    sigma = torch.linalg.svdvals(layer.weight.detach().double())
    assert float(sigma.max()) <= 2 * (1 + 1e-6) and float(sigma.min()) > 1.9


def test_bounds_follow_writes_of_every_kind() -> None:
    layer, shapes = NormalizedLinear(3, 3), Shapes((3,), (3,))
    for write in (
        lambda: layer.weight.data.mul_(2),
        lambda: layer.weight.data.__setitem__((0, 0), 9.0),
        lambda: layer.load_state_dict({"weight": 5 * torch.eye(3), "bias": torch.zeros(3)}),
        lambda: layer.double(),
        lambda: setattr(layer, "weight", torch.nn.Parameter(7 * torch.eye(3))),
    ):
        layer.operator_norms(shapes)
        write()
        sigma = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
        assert layer.operator_norms(shapes).two_two == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"in_features": 0},
        {"out_features": -1},
        {"max_norm": 0.0},
        {"max_norm": float("nan")},
        {"ball": "nuclear"},
        {"orthogonalize": -1},
        {"ball": "rows_l1", "orthogonalize": 3},
    ],
    ids=str,
)
def test_options_are_checked(options: dict) -> None:
    with pytest.raises(ConfigError, match="NormalizedLinear: expected"):
        NormalizedLinear(**{"in_features": 3, "out_features": 2} | options)


def test_shapes_are_checked() -> None:
    for x in (torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 1, 3)):
        with pytest.raises(ValueError, match=r"x \[B, 3\]"):
            NormalizedLinear(3, 2)(x)


def test_a_ball_of_radius_zero_is_refused_not_replaced() -> None:
    with pytest.raises(ConfigError):
        NormalizedLinear(2, 2, max_norm=0)


def test_a_column_ball_does_not_claim_to_be_a_contraction_in_linf() -> None:
    layer = NormalizedLinear(3, 2, ball="columns_l1")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    layer.project_()
    norms = layer.operator_norms(Shapes((3,), (2,)))
    assert norms.one_one == pytest.approx(1.0)
    assert norms.inf_inf >= 3.0
