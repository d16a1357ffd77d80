# SPDX-License-Identifier: Apache-2.0
"""Learned linear splines."""

import pytest
import torch

from dplip.errors import ConfigError
from dplip.layers import LinearSpline, LipschitzLayer, Shapes
from dplip.norms import Norms
from dplip.testing import LayerContract


class TestUnitEnds(LayerContract):
    in_shape = (4,)
    tight = frozenset({"coefficients"})
    constraint = {"inf_inf": 1.0, "two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return LinearSpline(4, intervals=7, reach=1.3, init="maxmin")


class TestClampedEnds(LayerContract):
    in_shape = (3,)
    tight = frozenset({"coefficients"})
    constraint = {"inf_inf": 1.0, "two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return LinearSpline(3, intervals=10, ends="clamp", init="relu")


class TestShared(LayerContract):
    in_shape = (2, 3, 2)
    tight = frozenset({"coefficients"})

    def make(self) -> LipschitzLayer:
        return LinearSpline(2, intervals=4, init="absolute_value")


class TestOneInterval(LayerContract):
    in_shape = (2,)

    def make(self) -> LipschitzLayer:
        return LinearSpline(2, intervals=1, reach=0.5)


class TestScaled(LayerContract):
    in_shape = (3,)
    tight = frozenset({"coefficients", "scale"})
    constraint = {"inf_inf": 1.0, "two_two": 1.0}

    def make(self) -> LipschitzLayer:
        layer = LinearSpline(3, intervals=5, init="maxmin", ends="match", scaled=True, scale_range=(0.5, 2.0))
        with torch.no_grad():
            layer.scale.copy_(torch.tensor([0.5, 1.0, 1.7]))
        return layer


class TestScaledShared(LayerContract):
    in_shape = (2, 3)
    constraint = {"inf_inf": 1.0, "two_two": 1.0}

    def make(self) -> LipschitzLayer:
        return LinearSpline(2, intervals=4, init="relu", ends="clamp", scaled=True, projection="nearest")


RANGES = (0.1, 0.15, 0.25, 0.7, 1.0, 3.0, 7.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_is_exact_far_outside_for_every_knot_count(dtype: torch.dtype) -> None:
    for knots in range(2, 202):
        for reach in RANGES:
            layer = LinearSpline(3, intervals=knots - 1, reach=reach).to(dtype)
            inside = torch.linspace(-reach, reach, 11, dtype=dtype)
            x = torch.cat([inside, torch.tensor([-10, -reach * 1.001, reach * 1.001, 10, 1e4], dtype=dtype)])
            y = layer(x[:, None].expand(-1, 3))
            torch.testing.assert_close(y, x[:, None].expand(-1, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("intervals", [1, 2, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_slope_at_the_ends_of_the_grid(intervals: int, dtype: torch.dtype) -> None:
    """Rounding next to the last knot must not add the grid's slope to the end's."""
    for reach in RANGES:
        layer = LinearSpline(1, intervals=intervals, reach=reach).to(dtype)
        edge = torch.tensor([reach, -reach], dtype=dtype)
        x = torch.cat([edge, edge.nextafter(2 * edge), edge.nextafter(0 * edge), edge * (1 + 1e-6)])[:, None]
        (slope,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
        torch.testing.assert_close(slope, torch.ones_like(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("init", "function"), [("absolute_value", torch.abs), ("relu", torch.relu), ("identity", lambda x: x)]
)
def test_matched_ends_start_as_the_function_everywhere(init: str, function) -> None:
    layer = LinearSpline(2, intervals=6, init=init, ends="match", scaled=True).double()
    layer.reset_parameters()
    x = torch.linspace(-50, 50, 201, dtype=torch.float64)[:, None].expand(-1, 2)
    torch.testing.assert_close(layer(x), function(x), rtol=0, atol=1e-12)


def test_maxmin_starts_as_absolute_value_and_identity_in_turn() -> None:
    layer = LinearSpline(4, intervals=6, init="maxmin", ends="match").double()
    x = 10 * torch.randn(50, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:, 0::2], x[:, 0::2].abs())
    torch.testing.assert_close(layer(x)[:, 1::2], x[:, 1::2])


def trained(**options) -> LinearSpline:
    layer = LinearSpline(3, scaled=True, **options).double()
    with torch.no_grad():
        layer.coefficients.normal_()
        layer.scale.uniform_(0.3, 3.0)
    layer.project_()
    return layer


def test_scale_gradient_is_the_true_derivative() -> None:
    for ends in ("clamp", "unit", "match"):
        layer = trained(intervals=7, ends=ends, init="relu")
        x = 2 * torch.randn(200, 3, dtype=torch.float64)
        (got,) = torch.autograd.grad(layer(x).sum(), layer.scale)
        with torch.no_grad():
            h = 1e-8
            layer.scale += h
            high = layer(x).sum(0)
            layer.scale -= 2 * h
            low = layer(x).sum(0)
        torch.testing.assert_close(got, (high - low) / (2 * h), rtol=1e-4, atol=1e-4)


def test_scale_bound_needs_no_bounded_input() -> None:
    layer, g = trained(intervals=5), Norms(3, linf=1.0, l2=1.0, l1=1.0)
    shapes = Shapes((3,), (3,))
    bound = layer.param_sensitivity(Norms(3), g, shapes)["scale"]
    assert bound < 1e3
    for far in (1.0, 1e3, 1e9, 1e15):
        x = far * torch.randn(300, 3, dtype=torch.float64)
        grad = layer.per_sample_grad(x, torch.eye(3, dtype=torch.float64).repeat(100, 1))["scale"]
        assert float(grad.norm(dim=1).max()) <= bound * (1 + 1e-12)


def test_rounding_adds_nothing_to_the_scale_gradient() -> None:
    """x phi'(x) - phi(x) vanishes for |x|, but its rounding errors grow with x and would be released without noise."""
    layer = LinearSpline(2, intervals=6, init="absolute_value", ends="match", scaled=True)
    x = 1e6 * torch.randn(500, 2)
    (grad,) = torch.autograd.grad(layer(x).sum(), layer.scale)
    bound = layer.param_sensitivity(Norms(2), Norms(2, linf=1.0), Shapes((2,), (2,)))["scale"]
    assert bound < 1e-6
    assert float(grad.abs().max()) <= 500 * bound * 1.01


def test_scale_stays_positive() -> None:
    layer = LinearSpline(4, scaled=True, scale_range=(0.5, 2.0))
    with torch.no_grad():
        layer.scale.copy_(torch.tensor([0.0, -3.0, 1e9, 1.0]))
    x = torch.randn(20, 4)
    before = layer(x)
    assert bool(before.isfinite().all())
    layer.project_()
    assert float(layer.scale.detach().amin()) == 0.5 and float(layer.scale.detach().amax()) == 2.0
    torch.testing.assert_close(layer(x), before)
    (grad,) = torch.autograd.grad(layer.double()(x.double()).sum(), layer.scale)
    assert bool(grad.isfinite().all())  # on the edge of its range the scale can still move


def test_penalty_and_regions_count_bends() -> None:
    layer = LinearSpline(2, intervals=8, init="maxmin").double()
    assert float(layer.tv2().detach()) == pytest.approx(2.0)
    assert layer.linear_regions().tolist() == [2, 1]


@pytest.mark.parametrize(
    "options",
    [{"ends": "linear"}, {"projection": "none"}, {"scale_range": (0.0, 2.0)}, {"scale_range": (2.0, 3.0)}],
)
def test_options_out_of_range(options) -> None:
    with pytest.raises(ConfigError, match="LinearSpline: expected"):
        LinearSpline(2, **options)


def test_grid_follows_the_dtype_and_a_state_dict_restores_the_function() -> None:
    """The original's grid is neither a buffer nor converted, and a checkpoint of another size loads silently."""
    spline = LinearSpline(4, intervals=7, reach=0.3, init="maxmin", scaled=True, ends="match")
    with torch.no_grad():
        spline.coefficients.add_(0.01 * torch.randn_like(spline.coefficients))
        spline.scale.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    again = LinearSpline(4, intervals=7, reach=0.3, scaled=True, ends="match")
    again.load_state_dict(spline.state_dict())
    x = torch.randn(20, 4)
    assert torch.equal(again(x), spline(x))
    torch.testing.assert_close(spline.double()(x.double()), again(x).double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="size mismatch"):
        LinearSpline(4, intervals=8, reach=0.3, scaled=True, ends="match").load_state_dict(spline.state_dict())
