# SPDX-License-Identifier: Apache-2.0
"""Linear functions on a ball cut by a box: weak duality, tightness and NaN."""

import math

import torch
from torch import Tensor

from dplip.certify.ball_box import ball_box_bound, dual


def problems(seed: int = 0, batch: int = 40, size: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    c = torch.randn(batch, size, dtype=torch.float64)
    c[:5, ::2] = 0
    lower, upper = (-torch.rand(batch, size, dtype=torch.float64), torch.rand(batch, size, dtype=torch.float64))
    upper[5:15] *= 0.05
    return c, 0.1 + 1.5 * torch.rand(batch, dtype=torch.float64), lower, upper


def project(y: Tensor, radius: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Onto the intersection: ``clip(y / (1 + mu))`` with the least ``mu >= 0`` that fits into the ball."""
    low, high = torch.zeros_like(radius), torch.ones_like(radius)
    for _ in range(50):
        middle = (low + high) / 2
        fits = torch.minimum(torch.maximum(y * middle.unsqueeze(1), lower), upper).norm(dim=1) <= radius
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.minimum(torch.maximum(y * low.unsqueeze(1), lower), upper)


def primal(c: Tensor, radius: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The value of a feasible point found by projected gradient ascent; the box contains 0."""
    d = torch.zeros_like(c)
    for _ in range(300):
        d = project(d + 0.2 * c, radius, lower, upper)
    return (c * d).sum(1)


def test_the_bound_matches_the_primal_and_is_never_below_it() -> None:
    c, r, lower, upper = problems()
    bound, value = ball_box_bound(c, r, lower, upper), primal(c, r, lower, upper)
    assert bool((bound >= value - 1e-15).all()) and float((bound - value).max()) < 1e-3
    ball, box = r * c.norm(dim=1), torch.maximum(c * lower, c * upper).sum(1)
    assert bool((bound <= torch.minimum(ball, box) * (1 + 1e-12) + 1e-12).all())
    assert bool((bound < 0.99 * torch.minimum(ball, box)).any())


def test_every_multiplier_is_sound() -> None:
    c, r, lower, upper = problems(1)
    value = primal(c, r, lower, upper)
    for multiplier in (1e-9, 1e-3, 0.1, 1.0, 30.0, 1e6):
        assert bool((dual(c, r, lower, upper, torch.full_like(r, multiplier)) >= value).all())


def test_boxes_away_from_zero_and_points_of_the_intersection() -> None:
    c, r, lower, upper = problems(2)
    lower = lower.clone()
    lower[:, 0] = upper[:, 0] * 0.5
    bound = ball_box_bound(c, r, lower, upper)
    for _ in range(200):
        d = lower + (upper - lower) * torch.rand_like(lower)
        inside = d.norm(dim=1) <= r
        assert bool(((c * d).sum(1) <= bound)[inside].all())


def test_unbounded_boxes_zero_radius_and_nan() -> None:
    c, r, _, _ = problems(3)
    everywhere = torch.full_like(c, math.inf)
    torch.testing.assert_close(ball_box_bound(c, r, -everywhere, everywhere), r * c.norm(dim=1))
    assert float(ball_box_bound(c, 0 * r, -everywhere, everywhere).abs().max()) == 0.0
    broken = torch.full_like(c[:1], math.nan)
    for arguments in ((broken, r[:1]), (c[:1], r[:1] * math.nan)):
        assert bool(ball_box_bound(*arguments, -everywhere[:1], everywhere[:1]).isnan().all())
    assert bool(ball_box_bound(c[:1], r[:1], broken, everywhere[:1]).isnan().all())
