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


@pytest.mark.parametrize("limit", ["EIGEN_LIMIT", "CHOLESKY_LIMIT"])
def test_cheaper_methods_take_over_from_the_eigenvalues(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(9, 11, dtype=torch.float64)
    by_eigenvalues = spectral_bound(w)
    monkeypatch.setattr(operator_norm, limit, 8)
    other = spectral_bound(w)
    assert other != by_eigenvalues
    assert by_eigenvalues * (1 - 1e-9) <= other <= by_eigenvalues * 1.01


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("name", "w"), matrices(), ids=lambda v: v if isinstance(v, str) else "")
def test_factorisation_certifies_an_upper_bound(
    name: str, w: Tensor, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_norm, "EIGEN_LIMIT", 2)
    true, bound = exact(w)["two_two"], spectral_bound(w.T if transposed else w)
    assert true * (1 - 1e-15) <= bound <= true * (1 + 1.1e-3), name


@pytest.mark.parametrize("shape", [(128, 128), (256, 300), (640, 512)], ids=str)
def test_sides_that_are_padded(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_norm, "EIGEN_LIMIT", 100)
    torch.manual_seed(0)
    for w in (torch.randn(shape), torch.nn.init.orthogonal_(torch.empty(shape)), torch.ones(shape)):
        true = float(torch.linalg.svdvals(w.double())[0])
        assert true * (1 - 1e-15) <= spectral_bound(w) <= true * (1 + 1.1e-3)


@pytest.mark.parametrize("start", [1e-9, 0.5, 0.999, 1.0])
def test_a_low_proposal_costs_tightness_not_truth(start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far below the norm the search begins, the factorisation lets nothing below it through."""
    monkeypatch.setattr(operator_norm, "EIGEN_LIMIT", 2)
    lanczos = operator_norm._lanczos
    monkeypatch.setattr(operator_norm, "_lanczos", lambda w: start * lanczos(w))
    for size in (3, 20, 60):
        w = torch.randn(size, size, dtype=torch.float64)
        true = float(torch.linalg.svdvals(w)[0])
        assert true <= spectral_bound(w) <= 1.8 * true
        q = torch.linalg.qr(w)[0]  # no gap at all
        assert 1 - 1e-15 <= spectral_bound(q) <= 1.8


def test_search_sees_a_direction_it_does_not_start_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that lies where the fixed first vector has no component is still bounded."""
    monkeypatch.setattr(operator_norm, "EIGEN_LIMIT", 2)
    n = 30
    first = torch.cos(torch.arange(1, n + 1, dtype=torch.float64) ** 2)
    hidden = torch.randn(n, dtype=torch.float64)
    hidden -= first * (hidden @ first) / (first @ first)
    hidden /= hidden.norm()
    w = 1e-3 * torch.eye(n, dtype=torch.float64) + 5 * torch.outer(hidden, hidden)
    true = float(torch.linalg.svdvals(w)[0])
    assert true <= spectral_bound(w) <= 1.1 * true


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
