# SPDX-License-Identifier: Apache-2.0
"""Slope projections: feasible, idempotent, and the Euclidean one optimal by its KKT conditions."""

import pytest
import torch
from torch import Tensor

from dplip.kernels.slope_projection import clip_slopes, nearest_slopes

PROJECTIONS = [clip_slopes, nearest_slopes]


def hard_rows(knots: int) -> Tensor:
    """Random, scaled, feasible, constant, tied, alternating, one-hot and monotone rows."""
    k = torch.arange(knots, dtype=torch.float64)
    rows = [torch.randn(30, knots, dtype=torch.float64) * s for s in (0.01, 1.0, 100.0)]
    rows += [torch.randint(-2, 3, (30, knots)).double() * 0.1, torch.zeros(1, knots, dtype=torch.float64)]
    rows += [0.1 * k[None], -0.1 * k[None], 5 * k[None], (-1.0) ** k[None], 100 * (k == knots // 2).double()[None]]
    return torch.cat(rows)


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("knots", [2, 3, 4, 21, 22])
def test_feasible_idempotent_and_mean_kept(project, knots: int) -> None:
    c = hard_rows(knots)
    v = project(c, 0.1)
    assert v.shape == c.shape
    assert float(v.diff(dim=1).abs().max()) <= 0.1 + 1e-12
    torch.testing.assert_close(project(v, 0.1), v, rtol=0, atol=1e-11)
    torch.testing.assert_close(v.mean(1), c.mean(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("knots", [2, 3, 4, 21, 22])
def test_nearest_satisfies_the_kkt_conditions(knots: int) -> None:
    """``v - c = D^T mu`` with ``mu`` pushing only where the constraint binds: then no feasible point is nearer."""
    c, step = hard_rows(knots), 0.1
    v = nearest_slopes(c, step)
    pressure = (v - c).cumsum(1)  # of the constraint between knots k and k + 1
    scale = 1 + c.abs().amax(1, keepdim=True) * knots
    assert bool((pressure[:, -1:].abs() <= 1e-11 * scale).all())
    pressure, slope = pressure[:, :-1], v.diff(dim=1)
    slack = slope.abs() < step - 1e-9
    assert bool((pressure.abs() <= 1e-10 * scale)[slack].all())
    assert bool((pressure * slope.sign() >= -1e-10 * scale).all())


def test_nearest_beats_clipping_and_does_not_expand() -> None:
    a, b = torch.randn(400, 12, dtype=torch.float64), torch.randn(400, 12, dtype=torch.float64)
    near, clip = nearest_slopes(a, 0.3), clip_slopes(a, 0.3)
    assert bool(((near - a).norm(dim=1) <= (clip - a).norm(dim=1) + 1e-12).all())
    assert float(((near - a).norm(dim=1) / (clip - a).norm(dim=1)).min()) < 0.95
    apart = (a - b).norm(dim=1)
    assert bool(((near - nearest_slopes(b, 0.3)).norm(dim=1) <= apart + 1e-12).all())
    # Clipping does expand distances somewhere, which is why it may not stand inside a private gradient.
    worst = 0.0
    for _ in range(20):
        p = torch.randn(2000, 12, dtype=torch.float64)
        q = p + 1e-3 * torch.randn_like(p)
        moved = (clip_slopes(p, 0.3) - clip_slopes(q, 0.3)).norm(dim=1) / (p - q).norm(dim=1)
        worst = max(worst, float(moved.max()))
    assert worst > 1.2


def test_nearest_agrees_with_a_general_solver() -> None:
    from scipy.optimize import minimize

    c = torch.randn(5, 6, dtype=torch.float64)
    found = nearest_slopes(c, 0.4)
    for row, v in zip(c.numpy(), found.numpy(), strict=True):
        solved = minimize(
            lambda w, row=row: 0.5 * ((w - row) ** 2).sum(),
            0 * row,
            jac=lambda w, row=row: w - row,
            method="SLSQP",
            constraints=[
                {"type": "ineq", "fun": lambda w: 0.4 - (w[1:] - w[:-1])},
                {"type": "ineq", "fun": lambda w: 0.4 + (w[1:] - w[:-1])},
            ],
            options={"ftol": 1e-14, "maxiter": 300},
        )
        torch.testing.assert_close(torch.from_numpy(solved.x), torch.from_numpy(v), rtol=0, atol=1e-6)
