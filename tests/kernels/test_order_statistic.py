# SPDX-License-Identifier: Apache-2.0
"""Order-statistic distances: values, gradients, ties and intervals."""

import itertools

import pytest
import torch
from torch import Tensor

from dplip.kernels import distance
from dplip.kernels.order_statistic import (
    order_statistic,
    order_statistic_indices,
    order_statistic_interval,
    order_statistic_reference,
)

WEIGHTS = [[1.0], [0.7, 0.3], [0.1, 0.2, 0.6], [0.0, 1.0], [0.1] * 9, [1 / 12] * 12]


def by_sort(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The formula, by a full sort."""
    t = (x[:, None] - w[None]).abs().sort(-1, descending=True)[0]
    return t[..., : len(c)] @ c


def draw(b: int, o: int, i: int) -> tuple[Tensor, Tensor]:
    return torch.randn(b, i, dtype=torch.float64), torch.randn(o, i, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1, 12), (3, 7, 12), (5, 2, 13), (0, 3, 12)])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_value_is_the_formula(shape: tuple[int, int, int], weights: list[float]) -> None:
    x, w = draw(*shape)
    c = torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(order_statistic(x, w, c), by_sort(x, w, c))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gradients_are_right(weights: list[float]) -> None:
    x, w = (v.requires_grad_() for v in draw(3, 4, 12))
    c = torch.tensor(weights, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: order_statistic(x, w, c), (x, w))


@pytest.mark.parametrize("k", [1, 3, 8, 9, 12])
def test_every_order_statistic_credits_an_index_of_its_own(k: int) -> None:
    """At ties too: all entries equal, pairs equal, and inputs on top of the weights."""
    w = torch.randint(-1, 2, (6, 12)).double()
    x = torch.cat([torch.randint(-1, 2, (20, 12)).double(), torch.zeros(1, 12), w[:2]]).requires_grad_()
    c = torch.rand(k, dtype=torch.float64)
    c = c / c.sum()
    index = order_statistic_indices(x.detach(), w, c)
    assert index.dtype == torch.int64 and index.shape == (len(x), 6, k)
    for row in index.flatten(0, 1).tolist():
        assert len(set(row)) == k
    y, saved = order_statistic_reference(x.detach(), w, c)
    assert saved.dtype == torch.int32
    largest = (x.detach()[:, None] - w).abs().gather(2, index)
    assert bool((largest.diff(dim=2) <= 0).all())
    torch.testing.assert_close(largest @ c, y)
    for o in range(6):
        (row,) = torch.autograd.grad(order_statistic(x, w, c)[:, o].sum(), x)
        assert float(row.abs().sum(1).max()) <= float(c.sum()) * (1 + 1e-12)
        assert float(torch.linalg.vector_norm(row, dim=1).max()) <= float(c.norm()) * (1 + 1e-12)


def test_a_tie_of_784_pixels_credits_one() -> None:
    x, w = torch.zeros(1, 784, requires_grad=True), torch.full((1, 784), 0.5, requires_grad=True)
    order_statistic(x, w, torch.ones(1)).sum().backward()
    assert x.grad.abs().sum() == w.grad.abs().sum() == 1.0
    assert int((w.grad != 0).sum()) == 1


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (v.requires_grad_() for v in draw(11, 5, 12))
    c = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def run() -> list[Tensor]:
        y = order_statistic(x, w, c)
        interval = order_statistic_interval(x.detach() - 0.1, x.detach() + 0.2, w.detach(), c)
        return [y, *torch.autograd.grad(y.square().sum(), [x, w]), *interval]

    whole = run()
    monkeypatch.setattr(distance, "_BLOCK_ELEMENTS", 2 * w.numel())
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [0.1, 0.2, 0.6]], ids=str)
def test_interval_is_exact(weights: list[float]) -> None:
    """Extremes are attained where every coordinate is nearest to, or farthest from, its weight."""
    w = torch.randn(4, 3, dtype=torch.float64)
    c = torch.tensor(weights, dtype=torch.float64)
    for width in (0.0, 0.1, 3.0):
        lower = torch.randn(5, 3, dtype=torch.float64)
        upper = lower + width * torch.rand(5, 3, dtype=torch.float64)
        low, high = order_statistic_interval(lower, upper, w, c)
        corners = [torch.where(torch.tensor(bits), upper, lower) for bits in itertools.product([False, True], repeat=3)]
        at_corners = torch.stack([by_sort(x, w, c) for x in corners])
        torch.testing.assert_close(high, at_corners.amax(0))
        nearest = torch.stack([by_sort(w[o].clamp(lower, upper), w, c)[:, o] for o in range(4)], 1)
        torch.testing.assert_close(low, nearest)


def test_large_and_nan_inputs() -> None:
    w, c = torch.zeros(2, 3), torch.tensor([0.6, 0.4])
    assert order_statistic(torch.full((1, 3), 1e38), w, c).isfinite().all()
    y = order_statistic(torch.tensor([[float("nan"), 1.0, 2.0], [1.0, 2.0, 3.0]]), w, c)
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize(
    ("x", "w", "c", "text"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), torch.ones(1), "got \\(2, 3\\) and \\(4, 5\\)"),
        (torch.zeros(3), torch.zeros(4, 3), torch.ones(1), "expected x \\[B, I\\]"),
        (torch.zeros(2, 0), torch.zeros(4, 0), torch.ones(1), "I >= 1"),
        (torch.zeros(2, 3), torch.zeros(4, 3).double(), torch.ones(1), "one floating dtype"),
        (torch.zeros(2, 3).long(), torch.zeros(4, 3).long(), torch.ones(1), "one floating dtype"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.ones(4), "1..3 weights"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.ones(0), "1..3 weights"),
        (torch.zeros(2, 3), torch.zeros(4, 3), torch.ones(1).double(), "weights of torch.float32"),
        (torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), torch.ones(1), "one device"),
    ],
)
def test_operands_that_do_not_fit(x: Tensor, w: Tensor, c: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        order_statistic(x, w, c)
