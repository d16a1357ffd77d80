# SPDX-License-Identifier: Apache-2.0
"""The input domain: its radii hold for every point in it, and nothing outside is let in."""

import math

import pytest
import torch
from torch import Tensor

from dplip.bounds import InputDomain
from dplip.errors import ConfigError, DataError

DOMAINS = [
    InputDomain((3,), 0.0, 1.0),
    InputDomain((2, 2), -1.0, 3.0, reference=0.5),
    InputDomain((4,), 0.0, 1.0, reference=0.5, l2_radius=0.7),
    InputDomain((4,), l2_radius=2.0, reference=-1.0),
    InputDomain((2,), 5.0, 6.0, reference=0.0),
    InputDomain((3,), 0.5, 0.5, reference=0.5),
    InputDomain((3,), -math.inf, 1.0),
]


def members(domain: InputDomain) -> Tensor:
    """Random points and corners of the domain, projected onto its ball."""
    low, high = max(domain.lower, -50.0), min(domain.upper, 50.0)
    share = torch.rand(200, *domain.shape, dtype=torch.float64)
    share[:100] = share[:100].round()
    x = low + (high - low) * share
    away = x - domain.reference
    norm = torch.linalg.vector_norm(away.flatten(1), dim=1).view(-1, *[1] * len(domain.shape))
    return domain.reference + away * (domain.l2_radius / norm).clamp_max(1)


@pytest.mark.parametrize("domain", DOMAINS, ids=repr)
def test_radius_and_magnitude_hold(domain: InputDomain) -> None:
    x = members(domain)
    domain.check(x, "x")
    for v, bound in ((x - domain.reference, domain.radius()), (x, domain.magnitude())):
        for name, p in (("l1", 1), ("l2", 2), ("linf", math.inf)):
            assert float(torch.linalg.vector_norm(v.flatten(1), p, dim=1).max()) <= getattr(bound, name) * (1 + 1e-12)


def test_by_hand() -> None:
    domain = InputDomain((4,), 0.0, 1.0, reference=0.5)
    assert (domain.dim, domain.radius().linf, domain.radius().l2, domain.magnitude().l2) == (4, 0.5, 1.0, 2.0)
    assert InputDomain((4,)).radius().linf == math.inf
    ball = InputDomain((4,), l2_radius=3.0)
    assert (ball.magnitude().l2, ball.magnitude().l1) == (3.0, 6.0)
    centre = domain.centre(torch.float64, torch.device("cpu"))
    assert centre.shape == (1, 4) and centre.dtype == torch.float64 and bool((centre == 0.5).all())


@pytest.mark.parametrize(
    "arguments",
    [
        {"shape": ()},
        {"shape": (3, 0)},
        {"shape": (-1,)},
        {"shape": (2,), "lower": 1.0, "upper": 0.0},
        {"shape": (2,), "lower": math.nan},
        {"shape": (2,), "upper": math.nan},
        {"shape": (2,), "reference": math.inf},
        {"shape": (2,), "l2_radius": -1.0},
        {"shape": (2,), "l2_radius": math.nan},
    ],
    ids=str,
)
def test_invalid_domains_are_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError, match="InputDomain: expected"):
        InputDomain(**arguments)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(2, 4), "shape \\(3,\\), got \\(4,\\)"),
        (torch.tensor([[0.0, math.nan, 0.0]]), "NaN or infinity"),
        (torch.tensor([[0.0, math.inf, 0.0]]), "NaN or infinity"),
        (torch.tensor([[0.0, 1.001, 0.0]]), "got \\[0, 1.001\\]"),
        (torch.tensor([[0.0, -1e-4, 0.0]]), "rescale them"),
        (torch.tensor([[0.9, 0.9, 0.9], [0.0, 0.0, 0.0]]), "l_2 distance 1 of the reference, got 1.55"),
    ],
)
def test_inputs_outside_are_refused(x: Tensor, text: str) -> None:
    with pytest.raises(DataError, match=f"batch: expected.*{text}"):
        InputDomain((3,), 0.0, 1.0, l2_radius=1.0).check(x, "batch")


def test_empty_batches_and_roundings_pass() -> None:
    domain = InputDomain((3,), -0.1, 1.1, l2_radius=1.7)
    domain.check(torch.zeros(0, 3), "x")
    domain.check(torch.tensor([[-0.1, 1.1, 0.3]]), "x")  # float32(1.1) > 1.1
    on_the_ball = torch.randn(500, 3)
    on_the_ball = on_the_ball / torch.linalg.vector_norm(on_the_ball, dim=1, keepdim=True)
    InputDomain((3,), l2_radius=1.0).check(on_the_ball, "x")


def test_no_slack_beyond_rounding() -> None:
    """A fixed slack would be many times a narrow domain's radius."""
    with pytest.raises(DataError):
        InputDomain((2,), 0.0, 1e-7).check(torch.full((1, 2), 1.05e-6), "x")
    with pytest.raises(DataError):
        InputDomain((2,), 0.0, 1.0).check(torch.full((1, 2), 1 + 1e-7, dtype=torch.float64), "x")
    with pytest.raises(DataError):
        InputDomain((1,), l2_radius=1.0).check(torch.full((1, 1), 1 + 1e-7, dtype=torch.float64), "x")
