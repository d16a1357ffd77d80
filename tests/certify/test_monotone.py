# SPDX-License-Identifier: Apache-2.0
"""Slope bounds contain what is measured, certify what they should, and refuse what is not monotone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dplip.audit.monotone import monotone_violations
from dplip.certify.monotone import certify_monotone, slope_bounds
from dplip.errors import ConfigError, DataError, UnsoundCertificate
from dplip.layers import (
    Abs,
    Clamp,
    ClippedReLU,
    ConvexMix,
    GroupSort,
    Householder,
    LearnedScale,
    LinearSpline,
    LinfDistance,
    MaxMin,
    MonotoneResidual,
    NormalizedLinear,
    PositionBias,
    ReferenceShift,
    Residual,
    Scale,
    Shapes,
    SortLinear,
)
from dplip.norms import OperatorNorms

WIDTH = 4


def linear(i: int, o: int, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(i, o)
    with torch.no_grad():
        layer.weight.mul_(scale * 2)
        layer.bias.normal_()
    return layer


def spline(ends: str, **options: Any) -> nn.Module:
    layer = LinearSpline(WIDTH, intervals=5, ends=ends, **options)
    with torch.no_grad():
        layer.coefficients.normal_(0, 0.4)
        if layer.scale is not None:
            layer.scale.uniform_(0.3, 3)
    layer.project_()
    return layer


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "abs": Abs,
    "clamp": lambda: Clamp(-0.3, 0.4),
    "clipped relu": lambda: ClippedReLU(WIDTH, 0.4),
    "spline": lambda: spline("unit"),
    "flat spline": lambda: spline("clamp"),
    "scaled spline": lambda: spline("match", scaled=True, init="absolute_value"),
    "maxmin": MaxMin,
    "sort": lambda: GroupSort(0),
    "householder": lambda: Householder(WIDTH, 0.9),
    "scales": lambda: nn.Sequential(Scale(-0.7), LearnedScale(1.5), PositionBias(WIDTH)),
    "mix": lambda: ConvexMix(nn.Sequential(linear(WIDTH, WIDTH), nn.ReLU()), 0.3),
    "residual": lambda: Residual(nn.Sequential(linear(WIDTH, WIDTH), MaxMin())),
    "distance": lambda: ReferenceShift(LinfDistance(WIDTH, WIDTH), 0.2),
    "sorted distance": lambda: SortLinear.top_k_mean(WIDTH, WIDTH, 2),
}


def net(name: str) -> nn.Module:
    return nn.Sequential(
        linear(3, WIDTH), MIDDLES[name](), linear(WIDTH, WIDTH), MIDDLES[name](), linear(WIDTH, 2)
    ).eval()


def secant_slopes(model: nn.Module, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """[B, C, d]: secant slopes between every x and a copy with one entry redrawn in the box."""
    columns = []
    model = model.requires_grad_(False)
    for i in range(x.shape[1]):
        moved = x.clone()
        moved[:, i] = lower[:, i] + (upper - lower)[:, i] * torch.rand(len(x), dtype=x.dtype)
        columns.append((model(moved) - model(x)) / (moved - x)[:, i : i + 1])
    return torch.stack(columns, 2).nan_to_num(0.0)


@pytest.mark.parametrize("name", MIDDLES)
def test_measured_slopes_lie_within_the_bounds_everywhere_and_in_boxes(name: str) -> None:
    model = net(name).double()
    low, high = slope_bounds(model, 3)
    slack = 1e-6
    for width in (1e-3, 0.05, 0.5, 3.0):
        centre = 2 * torch.randn(20, 3, dtype=torch.float64)
        lower, upper = centre - width, centre + width
        near, far = slope_bounds(model, 3, lower=lower, upper=upper)
        assert bool((near >= low - 1e-9).all()) and bool((far <= high + 1e-9).all())
        for _ in range(15):
            x = lower + (upper - lower) * torch.rand_like(lower)
            if torch.rand(()) < 0.3:
                x = torch.where(torch.rand_like(x) < 0.5, lower, upper)
            slopes = secant_slopes(model, x, lower, upper)
            gap = torch.maximum(near - slopes, slopes - far)
            # A slope between points closer than 1e-9 is all rounding; such pairs are one in a million here.
            assert float(gap.max()) <= slack, (name, width)


@pytest.mark.parametrize("name", ["relu", "abs", "maxmin", "spline", "householder"])
def test_a_tiny_box_gives_the_gradient(name: str) -> None:
    model = net(name).double()
    x = torch.randn(50, 3, dtype=torch.float64)
    near, far = slope_bounds(model, 3, lower=x - 1e-9, upper=x + 1e-9)
    x.requires_grad_()
    gradient = torch.stack([torch.autograd.grad(model(x)[:, j].sum(), x)[0] for j in range(2)], 1)
    exact = (far - near).amax((1, 2)) < 1e-6
    assert int(exact.sum()) > 35
    torch.testing.assert_close(near[exact], gradient[exact], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("first", "rest"),
    [("entries", "rows_l1"), ("rows_l2", "rows_l1"), ("columns_l1", "columns_l1"), ("spectral", "spectral")],
)
@pytest.mark.parametrize("activation", [MaxMin, Abs, lambda: GroupSort(4), lambda: Householder(8)])
def test_chains_of_balls_are_certified_at_their_constant_and_refused_below(
    first: str, rest: str, activation: Callable[[], nn.Module]
) -> None:
    signs = torch.tensor([1, 0, -1, 1])
    layers = [(4, 8, first), (8, 8, rest), (8, 2, rest)]
    parts = [m for i, o, ball in layers for m in (NormalizedLinear(i, o, ball=ball), activation())]
    with torch.no_grad():
        for part in parts:
            if isinstance(part, NormalizedLinear):
                part.weight.normal_(0, 3)
                part.project_()
    if isinstance(activation(), (GroupSort, Householder)):
        parts = parts[:-1]
    branch = nn.Sequential(*parts)
    strong = certify_monotone(MonotoneResidual(branch, signs, 2, strength=1.0 + 1e-5).eval(), signs)
    assert bool(strong.holds.all())
    assert strong.features.tolist() == [True, False, True, True]
    wide = (strong.upper - 1 - 1e-5)[:, 0], (strong.lower - 1 - 1e-5)[:, 0]
    assert float(wide[0].max()) <= 1 + 1e-5 and float(wide[1].min()) >= -1 - 1e-5  # [strength - B, strength + B]
    bare = certify_monotone(nn.Sequential(branch, Scale(2.0)).eval(), signs)
    assert not bool(bare.features.any())


def test_certificate_is_refused_one_step_below_the_slope() -> None:
    model = MonotoneResidual(nn.Linear(2, 1, bias=False), torch.tensor([1, 1])).eval()
    with torch.no_grad():
        model.branch.weight.copy_(torch.tensor([[-1.0, -1.0000002]]))
    assert certify_monotone(model, torch.tensor([1, 1])).features.tolist() == [False, False]  # 1 - 1 up to rounding
    with torch.no_grad():
        model.branch.weight.copy_(torch.tensor([[-0.999999, 7.0]]))
    assert certify_monotone(model, torch.tensor([1, 1])).features.tolist() == [True, True]


def test_a_box_certifies_where_space_does_not() -> None:
    model = nn.Sequential(Abs(), nn.Linear(1, 1)).eval()
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    assert not bool(certify_monotone(model, torch.tensor([1])).features.any())
    lower, upper = torch.tensor([[0.1], [-1.0], [-1.0]]), torch.tensor([[2.0], [-0.1], [1.0]])
    rising = certify_monotone(model, torch.tensor([1]), lower=lower, upper=upper)
    falling = certify_monotone(model, torch.tensor([-1]), lower=lower, upper=upper)
    assert rising.features.flatten().tolist() == [True, False, False]
    assert falling.features.flatten().tolist() == [False, True, False]


def test_steps_of_two_strengths_are_within_the_slope_interval_and_reached() -> None:
    model = MonotoneResidual(nn.Linear(1, 1, bias=False), torch.tensor([1])).eval()
    with torch.no_grad():
        model.branch.weight.fill_(1.0)
    certificate = certify_monotone(model, torch.tensor([1]))
    assert float(certificate.upper) == pytest.approx(2.0, abs=1e-9)
    attack = monotone_violations(model, torch.tensor([1]), torch.zeros(1, 1))
    assert attack.violations() == 0
    assert float(attack.slope) == pytest.approx(2.0, abs=1e-9)


def test_the_search_refutes_a_model_that_the_certificate_refuses_and_no_certified_one() -> None:
    signs = torch.tensor([1, -1, 0])
    found = 0
    for draw in range(6):
        torch.manual_seed(draw)
        branch = nn.Sequential(linear(3, 8, 0.6), MaxMin(), linear(8, 1, 0.6))
        for strength in (0.0, 0.3, 1.0, 3.0):
            model = MonotoneResidual(branch, signs, strength=strength).eval()
            proved = certify_monotone(model, signs).features
            attack = monotone_violations(model, signs, torch.rand(8, 3), domain=(-1.0, 1.0), steps=30)
            for i in (0, 1):
                worst = float(attack.descent[attack.feature == i].max())
                assert not (bool(proved[i]) and worst > 1e-9)
                found += worst > 1e-9
    assert found > 6


def test_nan_proves_nothing() -> None:
    model = MonotoneResidual(nn.Linear(1, 1), torch.tensor([1]), strength=9.0).eval()
    with torch.no_grad():
        model.branch.weight.fill_(float("nan"))
    assert not bool(certify_monotone(model, torch.tensor([1])).features.any())


def test_what_cannot_be_asked_is_refused() -> None:
    model = MonotoneResidual(nn.Linear(2, 1), torch.tensor([1, 0]))
    with pytest.raises(UnsoundCertificate):
        certify_monotone(model.train(), torch.tensor([1, 0]))
    model.eval()
    for directions in (torch.tensor([1.0, 0.5]), torch.ones(3, 2), torch.tensor(1)):
        with pytest.raises(ConfigError):
            certify_monotone(model, directions)
    one = torch.zeros(1, 2)
    with pytest.raises(ConfigError):
        certify_monotone(model, torch.tensor([1, 0]), lower=one)
    for lower, upper in ((one + 1, one), (one, one[:, :1]), (one, one + float("nan"))):
        with pytest.raises(DataError):
            certify_monotone(model, torch.tensor([1, 0]), lower=lower, upper=upper)
    empty = certify_monotone(model, torch.tensor([1, 0]), lower=one[:0], upper=one[:0])
    assert tuple(empty.lower.shape) == (0, 1, 2)


def test_a_subclass_with_another_forward_does_not_inherit_a_rule() -> None:
    class Tripled(Abs):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x.abs()

        def operator_norms(self, shapes: Shapes) -> OperatorNorms:
            return OperatorNorms.uniform(3.0)

    low, high = slope_bounds(Tripled().eval(), 2)
    assert float(low.min()) <= -3 and float(high.max()) >= 3


def test_the_wrong_balls_are_not_certified_and_do_break_monotonicity() -> None:
    branch = nn.Sequential(NormalizedLinear(2, 4, ball="entries"), NormalizedLinear(4, 1, ball="entries"))
    with torch.no_grad():
        branch[0].weight.fill_(-1.0)
        branch[1].weight.fill_(1.0)
    model, signs = MonotoneResidual(branch, torch.tensor([1, 0]), strength=1.0).eval(), torch.tensor([1, 0])
    assert not bool(certify_monotone(model, signs).features.any())
    assert monotone_violations(model, signs, torch.zeros(1, 2)).violations() == 1
