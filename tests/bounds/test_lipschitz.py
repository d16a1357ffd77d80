# SPDX-License-Identifier: Apache-2.0
"""Global Lipschitz constants: exact on linear networks, above every slope that sampling finds."""

import math

import pytest
import torch
from torch import Tensor, nn

from dplip.bounds import lipschitz, trace, unit_radii
from dplip.bounds.lipschitz import Lipschitz
from dplip.layers import (
    AveragePool2d,
    BallClip,
    Clamp,
    Flatten,
    GroupSort,
    LinfDistance,
    MaxMin,
    NormalizedLinear,
    Residual,
    Scale,
    SortLinear,
)


def constants(model: nn.Module, shape: tuple[int, ...]) -> Lipschitz:
    graph = trace(model)
    x = torch.zeros(1, *shape, dtype=next((p.dtype for p in model.parameters()), torch.float32))
    return lipschitz(graph, graph.evaluate(x))


class Sum(nn.Module):
    """3 x - W x and x, side by side."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.f = nn.Linear(w.shape[1], w.shape[0], bias=False).double()
        self.f.weight.data.copy_(w)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([3 * x, self.f(x) / 2], 1)


def test_exact_on_single_linear_maps() -> None:
    w = torch.randn(4, 6, dtype=torch.float64)
    linear = nn.Linear(6, 4).double()
    linear.weight.data.copy_(w)
    found = constants(linear, (6,))
    assert found.linf == pytest.approx(float(w.abs().sum(1).max()), rel=1e-9)
    assert found.l2 == pytest.approx(float(torch.linalg.matrix_norm(w, 2)), rel=1e-9)


def test_exact_on_chains_where_the_product_is() -> None:
    """Positive matrices of equal rows are exact in l_inf; multiples of orthogonal ones in l_2."""
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[1.0, 2.0, 0.5]]).expand(3, 3))
        b.weight.copy_(torch.tensor([[0.1, 0.2, 0.4]]).expand(3, 3))
    exact = float((b.weight @ a.weight).detach().sum(1).max())
    assert constants(nn.Sequential(a, GroupSort(0), b), (3,)).linf == pytest.approx(exact)
    with torch.no_grad():
        a.weight.copy_(2.0 * torch.linalg.qr(torch.randn(3, 3))[0])
        b.weight.copy_(0.3 * torch.linalg.qr(torch.randn(3, 3))[0])
    assert constants(nn.Sequential(a, b), (3,)).l2 == pytest.approx(0.6, rel=1e-6)


def test_by_hand() -> None:
    assert constants(nn.Sequential(LinfDistance(5, 4), SortLinear.top_k_mean(4, 3, 2)), (5,)).linf == pytest.approx(1.0)
    assert constants(LinfDistance(5, 4), (5,)).l2 == pytest.approx(2.0)
    assert constants(Residual(Scale(0.5)), (5,)).l2 == pytest.approx(1.5)
    assert constants(Residual(Scale(0.5), mix=0.4), (5,)).linf == pytest.approx(0.8)
    assert constants(nn.Sequential(AveragePool2d(2), Flatten()), (1, 4, 4)).l2 == pytest.approx(0.5)
    assert constants(nn.Sequential(BallClip(1.0)), (9,)).linf == pytest.approx(2.0)
    w = torch.eye(2, dtype=torch.float64) * 8
    found = constants(Sum(w), (2,))
    assert (found.linf, found.l2) == (pytest.approx(4.0), pytest.approx(5.0))


def test_caps_do_not_bind() -> None:
    """The width of a box bounds one move, not the slope."""
    model = nn.Sequential(Scale(1e6), Clamp(0.0, 1e-6), Scale(1e6))
    found = constants(model, (3,))
    assert found.linf == pytest.approx(1e12) and found.l2 == pytest.approx(1e12)
    slope = float((model(torch.full((1, 3), 1e-13)) - model(torch.zeros(1, 3))).max()) / 1e-13
    assert slope > 0.99e12


def test_constants_are_rounded_up_and_survive_underflow() -> None:
    assert constants(nn.Sequential(*[Scale(3.0) for _ in range(20)]), (2,)).linf >= 3.0**20
    model = nn.Sequential(Scale(1e-280), Scale(1e280)).double()
    assert constants(model, (2,)).linf >= 1.0
    assert constants(nn.Sequential(Scale(0.0)), (2,)).l2 == 0.0


def test_norms_are_named() -> None:
    graph = trace(Scale(2.0))
    with pytest.raises(ValueError, match="got 'l1'"):
        unit_radii(graph, graph.evaluate(torch.zeros(1, 2)), "l1")


@pytest.mark.parametrize("seed", range(6))
def test_no_sampled_slope_is_larger(seed: int) -> None:
    torch.manual_seed(seed)
    middle = [MaxMin(), GroupSort(3), nn.Tanh(), nn.LeakyReLU(2.0), BallClip(1.0), Residual(Scale(0.5))][seed]
    first = [nn.Linear(5, 6), LinfDistance(5, 6), SortLinear.geometric(5, 6, rho=0.4)][seed % 3]
    last = [NormalizedLinear(6, 4, ball="rows_l1"), LinfDistance(6, 4, p=4), nn.Linear(6, 4)][seed % 3]
    model = nn.Sequential(first, middle, last).double()
    found = constants(model, (5,))
    best = {"linf": 0.0, "l2": 0.0}
    for scale in (0.1, 1.0, 10.0):
        x = (scale * torch.randn(300, 5, dtype=torch.float64)).requires_grad_()
        y = model(x)
        j = torch.stack([torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0] for k in range(4)], 1)
        best["linf"] = max(best["linf"], float(j.abs().sum(2).max()))
        best["l2"] = max(best["l2"], float(torch.linalg.matrix_norm(j, 2).max()))
        for d in (torch.randn(300, 5).double(), torch.randn(300, 5).sign().double()):
            move = (model(x + d) - y).detach()
            for name, p in (("linf", math.inf), ("l2", 2)):
                slope = torch.linalg.vector_norm(move, p, dim=1) / torch.linalg.vector_norm(d, p, dim=1)
                best[name] = max(best[name], float(slope.max()))
    assert 0 < best["linf"] <= found.linf * (1 + 1e-9)
    assert 0 < best["l2"] <= found.l2 * (1 + 1e-9)
