# SPDX-License-Identifier: Apache-2.0
"""The slack for floating point covers what float32 really does."""

import math

import pytest
import torch
from torch import nn

from dplip.bounds import InputDomain, forward, input_like, sensitivities, trace
from dplip.bounds.rounding import FLOOR, growth, unit_roundoff
from dplip.layers import Abs, LinfDistance, MaxMin, NormalizedLinear, Scale
from dplip.norms import Norms


def slack(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> float:
    graph = trace(model)
    return growth(graph, graph.evaluate(torch.zeros(1, *shape, dtype=dtype)), dtype)


def test_unit_roundoff() -> None:
    assert unit_roundoff(torch.float32) == 2.0**-24
    assert unit_roundoff(torch.float64) == 2.0**-53
    assert FLOOR[torch.float32] > FLOOR[torch.float64] > 0


def test_growth_by_hand() -> None:
    assert slack(nn.Sequential(Abs(), MaxMin()), (4,)) == 0.0
    u = 2.0**-24
    assert slack(Scale(2.0), (4,)) == pytest.approx(u, rel=1e-6)
    one = 11 * u / (1 - 11 * u) * math.sqrt(11)
    assert slack(NormalizedLinear(10, 4), (10,)) == pytest.approx(one)
    two = nn.Sequential(NormalizedLinear(10, 10), NormalizedLinear(10, 4))
    assert slack(two, (10,)) == pytest.approx((1 + one) ** 2 - 1)
    assert slack(two.double(), (10,), torch.float64) < 1e-13


def test_a_sum_too_long_for_the_dtype_has_no_slack() -> None:
    assert slack(nn.Linear(3, 2).half(), (3,), torch.float16) < 0.1
    assert slack(nn.Linear(2000, 1).half(), (2000,), torch.float16) == math.inf


@pytest.mark.parametrize("p", [8.0, 1e3, 1e5, 1e6])
@pytest.mark.parametrize("d", [9, 300])
def test_slack_covers_power_means_in_float32(d: int, p: float) -> None:
    """The power multiplies rounding by p; rows of equal entries show it best."""
    layer = LinfDistance(d, 1, p=p, bias=False)
    base = [torch.randn(50, d), torch.ones(50, d), torch.randn(50, d).sign() * (1 + 1e-4 * torch.randn(50, d))]
    x = (torch.cat(base) * 10 ** torch.empty(150, 1).uniform_(-3, 3)).requires_grad_()
    with torch.no_grad():
        layer.weight.zero_()
    (row,) = torch.autograd.grad(layer(x).sum(), x)
    allowed = 1 + max(FLOOR[torch.float32], slack(layer, (d,)))
    assert float(row.double().abs().sum(1).max()) <= allowed


def test_slack_covers_an_orthogonal_network_in_float32() -> None:
    """Orthogonal layers attain their bounds exactly, so every rounding upwards shows."""
    width, depth = 128, 6
    model = nn.Sequential(*[NormalizedLinear(width, width, bias=False) for _ in range(depth)])
    graph, domain = trace(model), InputDomain((width,), l2_radius=10.0)
    bounds = sensitivities(graph, forward(graph, domain, input_like(model, domain)), Norms(width, l2=1.0))
    x, g = torch.randn(20, width), torch.randn(20, width)
    x, g = (v * (r / torch.linalg.vector_norm(v, dim=1, keepdim=True)) for v, r in ((x, 10.0), (g, 1.0)))
    allowed = 1 + max(FLOOR[torch.float32], slack(model, (width,)))
    for a, b in zip(x, g, strict=True):
        grads = torch.autograd.grad(model(a[None]), list(model.parameters()), b[None])
        for bound, grad in zip(bounds.values(), grads, strict=True):
            norm = float(torch.linalg.vector_norm(grad.double()))
            assert 0.999 * bound <= norm <= bound * allowed
