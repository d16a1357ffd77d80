# SPDX-License-Identifier: Apache-2.0
"""Order-statistic distances: values, gradients, ties and transforms."""

import pytest
import torch
from torch import Tensor

from dplip.kernels import distance
from dplip.kernels import order_statistic as operator
from dplip.kernels.dispatch import select
from dplip.kernels.order_statistic import (
    _OrderStatistic,
    order_statistic,
    order_statistic_ghost_norm,
    order_statistic_indices,
    order_statistic_reference,
    order_statistic_weight_grad,
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
        return [y, *torch.autograd.grad(y.square().sum(), [x, w])]

    whole = run()
    monkeypatch.setattr(distance, "_TILE_ELEMENTS", 2 * w.numel())
    monkeypatch.setattr(operator, "_SCATTER_ELEMENTS", 2 * len(w) * len(c))
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b)


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


def lattice(b: int, o: int, i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Operands with many ties, and inputs that lie on top of weights."""
    return torch.randint(-2, 3, (b, i)).to(dtype), torch.randint(-2, 3, (o, i)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("shape", [(1, 1, 11), (7, 5, 37), (0, 3, 12), (4, 0, 12), (130, 3, 700)])
def test_blocked_is_the_reference(shape: tuple[int, int, int], k: int, dtype: torch.dtype) -> None:
    c = torch.rand(k, dtype=dtype)
    for x, w in (lattice(*shape, dtype), (v.to(dtype) for v in draw(*shape))):
        y, index = order_statistic_reference(x, w, c, True)
        fast, fast_index = select("order_statistic", "cpu")(x, w, c, True)
        assert select("order_statistic", "cpu") is not order_statistic_reference
        assert torch.equal(fast, y) and fast_index.dtype == torch.int32
        assert k > 1 or torch.equal(fast_index, index)
        assert select("order_statistic", "cpu")(x, w, c, False)[1].numel() == 0


def test_the_lowest_index_is_credited_at_a_tie() -> None:
    x, w = lattice(40, 30, 50)
    t = (x[:, None] - w).abs()
    first = (t == t.amax(-1, keepdim=True)).double().argmax(-1, keepdim=True)
    assert torch.equal(order_statistic_indices(x, w, torch.ones(1).double()), first)


@pytest.mark.parametrize("k", [1, 3])
def test_raw_operators(k: int) -> None:
    x, w = draw(4, 3, 6)
    c, dy = torch.rand(k, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    ops = torch.ops.dplip
    index = ops.order_statistic(x, w, c, True)[1]
    for flag in (False, True):
        torch.library.opcheck(ops.order_statistic, (x, w, c, flag))
        torch.library.opcheck(ops.order_statistic_backward, (x, w, c, index, dy, flag, not flag))
    torch.library.opcheck(ops.order_statistic_weight_grad, (x, w, c, index, dy))
    torch.library.opcheck(ops.order_statistic_ghost_norm, (x, w, c, index, dy))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_per_example_gradients_and_their_norms(k: int, ties: bool) -> None:
    x, w = (lattice if ties else draw)(6, 5, 12)
    c, dy = torch.rand(k, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    w.requires_grad_()
    one_by_one = [torch.autograd.grad((order_statistic(x[b : b + 1], w, c) * dy[b]).sum(), w)[0] for b in range(6)]
    grad = order_statistic_weight_grad(x, w, c, dy)
    torch.testing.assert_close(grad, torch.stack(one_by_one))
    norm = order_statistic_ghost_norm(x, w, c, dy)
    torch.testing.assert_close(norm, grad.flatten(1).norm(dim=1))
    assert bool((norm <= c.norm() * dy.norm(dim=1) * (1 + 1e-12)).all())


@pytest.mark.parametrize("k", [1, 3])
def test_function_transforms(k: int) -> None:
    x, w = draw(5, 4, 8)
    c, dy = torch.rand(k, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)

    def loss(w: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return (order_statistic(x[None], w, c)[0] * dy).sum()

    per_example = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, 0, 0))(w, x, dy)
    torch.testing.assert_close(per_example[0], order_statistic_weight_grad(x, w, c, dy))
    whole = torch.func.grad(lambda w: torch.func.vmap(loss, (None, 0, 0))(w, x, dy).sum())(w)
    torch.testing.assert_close(whole, per_example[0].sum(0))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(per_example[1], torch.autograd.grad((order_statistic(leaf, w, c) * dy).sum(), leaf)[0])
    pairs = torch.func.vmap(torch.func.grad(lambda w, x, g: (order_statistic(x, w, c) * g).sum()), (None, 0, 0))
    two = pairs(w, x[:4].view(2, 2, 8), dy[:4].view(2, 2, 4))  # two examples a sample
    torch.testing.assert_close(two, per_example[0][:4].view(2, 2, 4, 8).sum(1))
    for argnum in (0, 1):
        jacobian = torch.func.jacrev(lambda x, w: order_statistic(x, w, c), argnums=argnum)(x, w)
        by_autograd = torch.autograd.functional.jacobian(lambda x, w: order_statistic(x, w, c), (x, w))[argnum]
        torch.testing.assert_close(jacobian, by_autograd)


def test_ensembles_of_weights() -> None:
    x, w, c = torch.randn(3, 5, 8), torch.randn(3, 4, 8), torch.ones(1)
    expected = torch.stack([order_statistic(a, b, c) for a, b in zip(x, w, strict=True)])
    assert torch.equal(torch.func.vmap(order_statistic, (0, 0, None))(x, w, c), expected)
    shared = torch.func.vmap(order_statistic, (None, 0, None))(x[0], w, c)
    assert torch.equal(shared, torch.stack([order_statistic(x[0], b, c) for b in w]))
    grad = torch.func.vmap(torch.func.grad(lambda w, x: order_statistic(x, w, c).sum()), (0, 0))(w, x)
    one = torch.func.grad(lambda w: order_statistic(x[1], w, c).sum())(w[1])
    assert torch.equal(grad[1], one)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # from torch itself
def test_compiles_without_a_graph_break() -> None:
    c = torch.tensor([0.6, 0.4], dtype=torch.float64)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return order_statistic(x, w, c).square().sum()

    eager, compiled = (tuple(v.requires_grad_() for v in draw(4, 3, 6)) for _ in range(2))
    for a, b in zip(compiled, eager, strict=True):
        a.data.copy_(b)
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_second_derivative_is_refused() -> None:
    x, w = (v.requires_grad_() for v in draw(3, 4, 5))
    y = order_statistic(x, w, torch.ones(1, dtype=torch.float64)).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="order_statistic: expected one derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_operands_give_float32_results(dtype: torch.dtype) -> None:
    x, w = (v.to(dtype).requires_grad_() for v in draw(5, 4, 9))
    c = torch.tensor([0.7, 0.3])
    y = order_statistic(x, w, c)
    assert y.dtype == torch.float32
    assert torch.equal(y, order_statistic(x.float(), w.float(), c))
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == dtype
    assert float(x.grad.abs().sum()) > 0


def test_gradients_without_a_saved_index() -> None:
    """Where a transform hides that a gradient will be asked for, the index is found in the backward pass."""
    x, w = (v.requires_grad_() for v in draw(3, 4, 6))
    c = torch.ones(2, dtype=torch.float64)
    expected = torch.autograd.grad(order_statistic(x, w, c).sum(), (x, w))
    got = torch.autograd.grad(_OrderStatistic.apply(x, w, c, False, None)[0].sum(), (x, w))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3])
def test_low_precision_selects_and_gradients_keep_their_norms(k: int, dtype: torch.dtype) -> None:
    """Operands so close that rounding changes which coordinate is the farthest."""
    x, w = (3 + 0.01 * torch.randn(*shape) for shape in ((40, 30), (8, 30)))
    x, w, c = x.requires_grad_(), w.requires_grad_(), torch.rand(k)
    y = order_statistic(x, w, c, dtype)
    assert y.dtype == torch.float32
    assert torch.equal(y, order_statistic(x.detach().to(dtype), w.detach().to(dtype), c))
    assert not torch.equal(y, order_statistic(x, w, c))
    for o in range(8):
        (row,) = torch.autograd.grad(y[:, o].sum(), x, retain_graph=True)
        assert row.dtype == torch.float32
        assert float(row.abs().sum(1).max()) <= float(c.sum()) * (1 + 1e-6)
        assert float(row.norm(dim=1).max()) <= float(c.norm()) * (1 + 1e-6)
    x0, w0, dy = x.detach(), w.detach(), torch.randn(40, 8)
    loss = torch.func.grad(lambda w, x, g: (order_statistic(x[None], w, c, dtype)[0] * g).sum())
    norms = torch.func.vmap(loss, (None, 0, 0))(w0, x0, dy).flatten(1).norm(dim=1)
    assert bool((norms <= c.norm() * dy.norm(dim=1) * (1 + 1e-6)).all())
    moved = (y - order_statistic(x, w, c)).detach().abs().max()
    u = torch.finfo(dtype).eps / 2
    assert 0 < float(moved) <= float(c.sum()) * u * (float(x0.abs().max()) + float(w0.abs().max())) * (1 + 1e-6)


def test_low_precision_is_half() -> None:
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        order_statistic(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1), torch.float64)
