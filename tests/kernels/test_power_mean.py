# SPDX-License-Identifier: Apache-2.0
"""Power-mean distances: values, gradients, extreme exponents and intervals."""

import itertools

import pytest
import torch
from torch import Tensor

from dplip.kernels import distance
from dplip.kernels.power_mean import power_mean, power_mean_interval, power_mean_rows

EXPONENTS = [2.0, 3.0, 8.0, 100.0, 1000.0]


def formula(x: Tensor, w: Tensor, p: float) -> Tensor:
    t = (x[:, None] - w[None]).abs().double()
    largest = t.amax(-1, keepdim=True)
    return (largest.squeeze(-1) * ((t / largest) ** p).mean(-1) ** (1 / p)).to(x.dtype)


def draw(b: int, o: int, i: int) -> tuple[Tensor, Tensor]:
    return torch.randn(b, i, dtype=torch.float64), torch.randn(o, i, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (4, 33, 13), (0, 3, 2)])
@pytest.mark.parametrize("p", EXPONENTS)
def test_value_is_the_formula(shape: tuple[int, int, int], p: float) -> None:
    x, w = draw(*shape)
    torch.testing.assert_close(power_mean(x, w, p), formula(x, w, p))


@pytest.mark.parametrize("p", EXPONENTS)
def test_gradients_are_right(p: float) -> None:
    x, w = (v.requires_grad_() for v in draw(3, 4, 5))
    assert torch.autograd.gradcheck(lambda x, w: power_mean(x, w, p), (x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", EXPONENTS)
def test_rows_stay_in_their_norms_at_extremes(p: float, dtype: torch.dtype) -> None:
    """Row l_1 <= 1 and l_2 <= d^(-1/p): from tiny to huge differences, ties, one-hot and zero."""
    d = 9
    base = torch.cat(
        [torch.randn(6, d), torch.ones(1, d), torch.eye(d)[:2], torch.randn(4, d).sign(), torch.zeros(1, d)]
    )
    slack = 1 + 8 * p * torch.finfo(dtype).eps
    for scale in (1e-30, 1e-3, 1.0, 1e3, 1e30):
        x = (scale * base).to(dtype)
        w = torch.zeros(1, d, dtype=dtype)
        y = power_mean(x, w, p)
        assert y.isfinite().all()
        rows = power_mean_rows(x[:, None] - w, y, p)
        assert rows.isfinite().all()
        assert float(rows.abs().sum(-1).max()) <= slack
        assert float(torch.linalg.vector_norm(rows, dim=-1).max()) <= d ** (-1 / p) * slack
        assert not rows[-1].any()  # x on top of w


def test_limit_is_the_largest_entry() -> None:
    x, w = draw(5, 4, 6)
    largest = (x[:, None] - w).abs().amax(-1)
    torch.testing.assert_close(power_mean(x, w, 1e6), largest, rtol=1e-5, atol=0)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (v.requires_grad_() for v in draw(11, 5, 6))

    def run() -> list[Tensor]:
        y = power_mean(x, w, 4.0)
        interval = power_mean_interval(x.detach() - 0.1, x.detach() + 0.2, w.detach(), 4.0)
        return [y, *torch.autograd.grad(y.square().sum(), [x, w]), *interval]

    whole = run()
    monkeypatch.setattr(distance, "_BLOCK_ELEMENTS", 2 * w.numel())
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [2.0, 8.0])
def test_interval_is_exact(p: float) -> None:
    w = torch.randn(4, 3, dtype=torch.float64)
    for width in (0.0, 0.1, 3.0):
        lower = torch.randn(5, 3, dtype=torch.float64)
        upper = lower + width * torch.rand(5, 3, dtype=torch.float64)
        low, high = power_mean_interval(lower, upper, w, p)
        corners = [torch.where(torch.tensor(bits), upper, lower) for bits in itertools.product([False, True], repeat=3)]
        torch.testing.assert_close(high, torch.stack([power_mean(x, w, p) for x in corners]).amax(0))
        nearest = torch.stack([power_mean(w[o].clamp(lower, upper), w, p)[:, o] for o in range(4)], 1)
        torch.testing.assert_close(low, nearest)


@pytest.mark.parametrize("p", [1.0, 1.99, -2.0, float("inf"), float("nan")])
def test_exponents_without_a_bound_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="2 <= p < inf"):
        power_mean(torch.zeros(1, 2), torch.zeros(1, 2), p)


def test_operands_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="power_mean: expected x"):
        power_mean(torch.zeros(2, 3), torch.zeros(4, 5), 2.0)
    with pytest.raises(ValueError, match="power_mean_interval: expected"):
        power_mean_interval(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 5), 2.0)
