# SPDX-License-Identifier: Apache-2.0
"""Operator norms of concrete matrices: never below the truth, at any scale and at every Gram iteration."""

import math

import pytest
import torch
from torch import Tensor

from dplip import operator_norm
from dplip.norms import OperatorNorms
from dplip.operator_norm import gram_bound, matrix_norms, spectral_bound


def matrices() -> list[tuple[str, Tensor]]:
    torch.manual_seed(0)
    out = [
        (f"random {o}x{i}", torch.randn(o, i, dtype=torch.float64))
        for o, i in ((1, 1), (1, 7), (7, 1), (5, 9), (40, 30))
    ]
    q = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    out += [
        ("orthogonal", q),
        ("ill-conditioned", q @ torch.diag(torch.logspace(0, -14, 12, dtype=torch.float64)) @ q.T),
        ("two equal singular values", q @ torch.diag(torch.tensor([3.0, 3.0] + [1.0] * 10).double()) @ q.T),
        ("rank one", torch.randn(9, 1, dtype=torch.float64) @ torch.randn(1, 6, dtype=torch.float64)),
        ("ones", torch.ones(8, 8, dtype=torch.float64)),
        ("Hilbert", 1 / (torch.arange(10)[:, None] + torch.arange(10)[None] + 1.0).double()),
        (
            "one entry",
            torch.zeros(4, 5, dtype=torch.float64).index_put(
                (torch.tensor(2), torch.tensor(3)), torch.tensor(-7.0).double()
            ),
        ),
        ("mixed scales", torch.randn(6, 6, dtype=torch.float64) * torch.logspace(-300, 100, 6, dtype=torch.float64)),
        ("float32", torch.randn(20, 30)),
    ]
    base = torch.randn(6, 5, dtype=torch.float64)
    out += [(f"times {s:g}", base * s) for s in (1e-300, 1e-170, 1e-161, 1e-20, 1e20, 1e150, 1e170, 1e300)]
    return out


def exact(w: Tensor) -> dict[str, float]:
    """By an SVD of the matrix scaled to unit size, which neither over- nor underflows."""
    size = float(w.double().abs().max())
    u = w.double() / size
    values = {
        "inf_inf": u.abs().sum(1).max(),
        "two_inf": torch.linalg.vector_norm(u, dim=1).max(),
        "two_two": torch.linalg.svdvals(u)[0],
        "one_one": u.abs().sum(0).max(),
        "one_inf": u.abs().max(),
    }
    return {name: float(v) * size for name, v in values.items()}


@pytest.mark.parametrize(("name", "w"), matrices(), ids=lambda v: v if isinstance(v, str) else "")
def test_matrix_norms_are_tight_upper_bounds(name: str, w: Tensor) -> None:
    found = matrix_norms(w)
    for field, true in exact(w).items():
        bound = getattr(found, field)
        assert true * (1 - 1e-15) <= bound, (name, field)
        assert bound <= true * (1 + 1e-9), (name, field)


@pytest.mark.parametrize("iterations", range(13))
@pytest.mark.parametrize(("name", "w"), matrices(), ids=lambda v: v if isinstance(v, str) else "")
def test_gram_is_an_upper_bound_at_every_iteration(name: str, w: Tensor, iterations: int) -> None:
    true, bound = exact(w)["two_two"], gram_bound(w, iterations)
    assert bound >= true * (1 - 1e-15), name
    assert bound <= true * min(w.shape) ** (0.5 ** (iterations + 2)) * (1 + 1e-9), name


def test_gram_takes_over_from_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(9, 11, dtype=torch.float64)
    by_svd = spectral_bound(w)
    monkeypatch.setattr(operator_norm, "SVD_LIMIT", 10)
    by_gram = spectral_bound(w)
    assert by_gram != by_svd
    assert by_svd * (1 - 1e-14) <= by_gram <= by_svd * 1.01


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite_give_no_bound(bad: float) -> None:
    w = torch.randn(3, 4)
    w[1, 2] = bad
    assert matrix_norms(w) == OperatorNorms()
    assert spectral_bound(w) == gram_bound(w) == math.inf


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (4, 0), (0, 0)])
def test_zero_and_empty(shape: tuple[int, int]) -> None:
    assert matrix_norms(torch.zeros(shape)) == OperatorNorms.uniform(0.0)
    assert spectral_bound(torch.zeros(shape)) <= 1e-300
    assert gram_bound(torch.zeros(shape)) == 0.0


def test_a_proved_spectral_bound_is_taken_over() -> None:
    assert matrix_norms(torch.eye(3), spectral=1.25).two_two == 1.25


def test_products_that_overflow_are_not_understated() -> None:
    w = torch.full((4, 4), 1.7e308, dtype=torch.float64)
    assert matrix_norms(w).inf_inf == math.inf
    assert spectral_bound(w) >= 1.7e308 and gram_bound(w) >= 1.7e308
