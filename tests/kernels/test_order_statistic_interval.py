# SPDX-License-Identifier: Apache-2.0
"""Interval bounds of order-statistic distances: exact, and with one-hot rows in their gradients."""

import itertools

import pytest
import torch
from torch import Tensor

from dplip.errors import UnsoundCertificate
from dplip.kernels import distance
from dplip.kernels import order_statistic_interval as operator
from dplip.kernels.dispatch import select
from dplip.kernels.order_statistic import order_statistic
from dplip.kernels.order_statistic_interval import order_statistic_interval, order_statistic_interval_reference

WEIGHTS = [[1.0], [0.7, 0.3], [0.1, 0.2, 0.6]]


def by_sort(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The formula, by a full sort."""
    t = (x[:, None] - w[None]).abs().sort(-1, descending=True)[0]
    return t[..., : len(c)] @ c


def boxes(b: int, o: int, i: int, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper ends and weights; with ``ties``, on a small lattice, weights inside, outside and at the ends."""
    if ties:
        lower = torch.randint(-2, 2, (b, i)).double()
        return lower, lower + torch.randint(0, 3, (b, i)), torch.randint(-3, 4, (o, i)).double() / 2
    lower = torch.randn(b, i, dtype=torch.float64)
    return lower, lower + torch.rand(b, i, dtype=torch.float64), torch.randn(o, i, dtype=torch.float64)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
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


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gradients_are_right(weights: list[float]) -> None:
    operands = tuple(v.requires_grad_() for v in boxes(3, 4, 7))
    c = torch.tensor(weights, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *v: order_statistic_interval(*v, c), operands)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_rows_have_the_norms_of_the_weights(k: int, ties: bool) -> None:
    operands = tuple(v.requires_grad_() for v in boxes(30, 6, 7, ties))
    c = torch.rand(k, dtype=torch.float64)
    for end in order_statistic_interval(*operands, c):
        for o in range(6):
            at_lower, at_upper, at_w = torch.autograd.grad(end[:, o].sum(), operands, retain_graph=True)
            row = torch.cat([at_lower, at_upper], 1)
            assert float(row.abs().sum(1).max()) <= float(c.sum()) * (1 + 1e-12)
            assert float(row.norm(dim=1).max()) <= float(c.norm()) * (1 + 1e-12)
            torch.testing.assert_close(at_w[o], -(at_lower + at_upper).sum(0))


def test_a_box_of_one_point_is_the_distance() -> None:
    x, _, w = boxes(5, 4, 9)
    c = torch.tensor([0.6, 0.4], dtype=torch.float64)
    y = order_statistic(x, w, c)
    for end in order_statistic_interval(x, x, w, c):
        assert torch.equal(end, y)


@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 11), (7, 5, 37), (0, 3, 12), (4, 0, 12), (130, 3, 700)])
def test_blocked_is_the_reference(shape: tuple[int, int, int], k: int, ties: bool) -> None:
    lower, upper, w = boxes(*shape, ties)
    c = torch.rand(k, dtype=torch.float64)
    expected = order_statistic_interval_reference(lower, upper, w, c)
    got = select("order_statistic_interval", "cpu")(lower, upper, w, c, True)
    assert all(torch.equal(a, b) for a, b in zip(got[: 4 if k == 1 else 2], expected, strict=False))
    assert all(v.numel() == 0 for v in select("order_statistic_interval", "cpu")(lower, upper, w, c, False)[2:])


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = tuple(v.requires_grad_() for v in boxes(11, 5, 8))
    c = torch.tensor([0.5, 0.3], dtype=torch.float64)

    def run() -> list[Tensor]:
        ends = order_statistic_interval(*operands, c)
        return [*ends, *torch.autograd.grad((ends[0] * ends[1]).sum(), operands)]

    whole = run()
    monkeypatch.setattr(distance, "_TILE_ELEMENTS", 2 * operands[2].numel())
    monkeypatch.setattr(operator, "_SCATTER_ELEMENTS", 20)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_raw_operators() -> None:
    lower, upper, w = boxes(4, 3, 6)
    c, dy = torch.rand(2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    ops = torch.ops.dplip
    index = ops.order_statistic_interval(lower, upper, w, c, True)[2:]
    for flag in (False, True):
        torch.library.opcheck(ops.order_statistic_interval, (lower, upper, w, c, flag))
        arguments = (lower, upper, w, c, *index, dy, dy, flag, not flag, flag)
        torch.library.opcheck(ops.order_statistic_interval_backward, arguments)


def test_function_transforms() -> None:
    lower, upper, w = boxes(5, 4, 8)
    c = torch.tensor([0.7, 0.3], dtype=torch.float64)

    def loss(w: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        low, high = order_statistic_interval(lower[None], upper[None], w, c)
        return (high - low).square().sum()

    per_example = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (None, 0, 0))(w, lower, upper)
    for b in range(5):
        leaves = [v.clone().requires_grad_() for v in (w, lower[b], upper[b])]
        for got, expected in zip(per_example, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(got[b], expected)
    whole = torch.func.grad(lambda w: torch.func.vmap(loss, (None, 0, 0))(w, lower, upper).sum())(w)
    torch.testing.assert_close(whole, per_example[0].sum(0))
    jacobian = torch.func.jacrev(lambda v: order_statistic_interval(v, upper, w, c)[1])(lower)
    torch.testing.assert_close(
        jacobian, torch.autograd.functional.jacobian(lambda v: order_statistic_interval(v, upper, w, c)[1], lower)
    )
    ensemble = torch.func.vmap(lambda w: order_statistic_interval(lower, upper, w, c)[0])(torch.stack([w, 2 * w]))
    assert torch.equal(ensemble[0], order_statistic_interval(lower, upper, w, c)[0])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from torch itself
def test_compiles_without_a_graph_break() -> None:
    lower, upper, w = boxes(4, 3, 6)
    c = torch.ones(1, dtype=torch.float64)

    def loss(lower: Tensor, w: Tensor) -> Tensor:
        low, high = order_statistic_interval(lower, upper, w, c)
        return (low * high).sum()

    leaves = (lower.requires_grad_(), w.requires_grad_())
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_derivative_is_refused() -> None:
    lower, upper, w = boxes(3, 2, 4)
    lower.requires_grad_()
    low, high = order_statistic_interval(lower, upper, w, torch.ones(1, dtype=torch.float64))
    (grad,) = torch.autograd.grad((low * high).sum(), lower, create_graph=True)
    with pytest.raises(NotImplementedError, match="order_statistic_interval: expected one derivative"):
        grad.sum().backward()


def test_nan_stays_visible() -> None:
    lower, upper, w = boxes(3, 2, 4)
    lower[0, 1], upper[1, 2] = torch.nan, torch.nan
    for end in order_statistic_interval(lower, upper, w, torch.ones(1, dtype=torch.float64)):
        assert end[:2].isnan().all() and end[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bounds_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    operands = [v.to(dtype) for v in boxes(2, 3, 4)]
    with pytest.raises(UnsoundCertificate, match="expected bounds in float32 or float64"):
        order_statistic_interval(*operands, torch.ones(1))


@pytest.mark.parametrize(
    ("upper", "c", "text"),
    [
        (torch.zeros(3, 3), torch.ones(1), "expected one shape"),
        (torch.zeros(2, 4), torch.ones(1), "expected x"),
        (torch.zeros(2, 3), torch.ones(4), "1..3 weights"),
    ],
)
def test_operands_that_do_not_fit(upper: Tensor, c: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        order_statistic_interval(torch.zeros(2, 3), upper, torch.zeros(4, 3), c)
