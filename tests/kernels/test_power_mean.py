# SPDX-License-Identifier: Apache-2.0
"""Power-mean distances: values, gradients, extreme exponents and intervals."""

import itertools

import pytest
import torch
from torch import Tensor

from dplip.kernels import distance
from dplip.kernels.power_mean import (
    power_mean,
    power_mean_ghost_norm,
    power_mean_interval,
    power_mean_rows,
    power_mean_weight_grad,
)

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


@pytest.mark.parametrize("p", [2.0, 8.0, 7.5])
def test_per_example_gradients(p: float) -> None:
    x, w = draw(4, 3, 6)
    dy = torch.randn(4, 3, dtype=torch.float64)
    x[0] = w[1]
    grad = power_mean_weight_grad(x, w, p, dy)
    for b in range(4):
        (alone,) = torch.autograd.grad(power_mean(x[b : b + 1], w.requires_grad_(), p), w, dy[b : b + 1])
        torch.testing.assert_close(grad[b], alone)
    torch.testing.assert_close(power_mean_ghost_norm(x, w.detach(), p, dy), grad.flatten(1).norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, w = (v.to(dtype).requires_grad_() for v in draw(5, 4, 300))
    full = [v.detach().float().requires_grad_() for v in (x, w)]
    y, exact = power_mean(x, w, 100.0), power_mean(full[0], full[1], 100.0)
    assert y.dtype == torch.float32 and torch.equal(y, exact)
    for got, expected in zip(torch.autograd.grad(y.sum(), [x, w]), torch.autograd.grad(exact.sum(), full), strict=True):
        assert got.dtype == dtype and torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("p", [8.0, 7.5])
def test_operators_are_well_formed(p: float) -> None:
    x, w = draw(3, 4, 5)
    y, dy = power_mean(x, w, p), torch.randn(3, 4, dtype=torch.float64)
    operators = torch.ops.dplip
    torch.library.opcheck(operators.power_mean.default, (x, w, p))
    for wanted in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(operators.power_mean_backward.default, (x, w, y, dy, p, *wanted))
    torch.library.opcheck(operators.power_mean_weight_grad.default, (x, w, y, dy, p))
    torch.library.opcheck(operators.power_mean_ghost_norm.default, (x, w, y, dy, p))


def test_function_transforms() -> None:
    x, w = draw(4, 3, 5)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return (power_mean(x, w, 8.0) * torch.arange(1.0, 4.0, dtype=x.dtype)).sum()

    def one(w: Tensor, x: Tensor) -> Tensor:
        return loss(x[None], w)

    weighted = torch.arange(1.0, 4.0, dtype=x.dtype).expand(4, 3)
    per_example = power_mean_weight_grad(x, w, 8.0, weighted)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one), (None, 0))(w, x), per_example)
    summed = torch.func.grad(lambda w: torch.func.vmap(one, (None, 0))(w, x).sum())(w)
    torch.testing.assert_close(summed, per_example.sum(0))
    jacobian = torch.func.jacrev(lambda x: power_mean(x, w, 8.0))(x)
    rows = power_mean_rows(x[:, None] - w, power_mean(x, w, 8.0), 8.0)
    torch.testing.assert_close(jacobian.diagonal(dim1=0, dim2=2).permute(2, 0, 1), rows)
    of_weights = torch.func.jacrev(lambda w: power_mean(x, w, 8.0))(w)
    torch.testing.assert_close(of_weights.diagonal(dim1=1, dim2=2).permute(0, 2, 1), -rows)


def test_maps_over_anything() -> None:
    x, w = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)
    for dims, alone in [
        ((0, 0), lambda n: (x[n], w[n])),
        ((0, None), lambda n: (x[n], w[0])),
        ((None, 0), lambda n: (x[0], w[n])),
    ]:
        operands = (x if dims[0] == 0 else x[0], w if dims[1] == 0 else w[0])

        def gradients(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            return torch.func.grad(lambda x, w: power_mean(x, w, 4.0).square().sum(), (0, 1))(x, w)

        got = [torch.func.vmap(lambda x, w: power_mean(x, w, 4.0), dims)(*operands)]
        got += torch.func.vmap(gradients, dims)(*operands)
        for n in range(3):
            expected = [power_mean(*alone(n), 4.0), *gradients(*alone(n))]
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a[n], b)
    nested = torch.func.vmap(torch.func.vmap(torch.func.grad(lambda x, w: power_mean(x[None], w, 4.0).sum())), (0, 0))
    x, w = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    rows = torch.func.grad(lambda x: power_mean(x, w[1, 2], 4.0).sum())(x[1, 2:])
    torch.testing.assert_close(nested(x, w)[1, 2:], rows)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_compiles_in_one_graph() -> None:
    x, w = (v.requires_grad_() for v in draw(3, 4, 5))

    def step(x: Tensor, w: Tensor) -> Tensor:
        return power_mean(x, w, 8.0).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, w), [x, w]), torch.autograd.grad(step(x, w), [x, w]), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused() -> None:
    x, w = (v.requires_grad_() for v in draw(3, 4, 5))
    (dx,) = torch.autograd.grad(power_mean(x, w, 8.0).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="power_mean: expected one derivative"):
        dx.sum().backward()


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
    monkeypatch.setattr(distance, "_TILE_ELEMENTS", 2 * w.numel())
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


@pytest.mark.parametrize("p", [2.0, 8.0, 7.5])
def test_interval_gradients(p: float) -> None:
    lower, w = (v.requires_grad_() for v in draw(4, 3, 5))
    upper = (lower.detach() + torch.rand(4, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *ends: power_mean_interval(*ends, p), (lower, upper, w))
    low, high = power_mean_interval(lower, upper, w, p)
    for end in (low, high):  # a row over both ends of the box has an l_1 norm of at most 1
        rows = [torch.autograd.grad(end[:, o].sum(), [lower, upper], retain_graph=True) for o in range(3)]
        assert all(float((a.abs() + b.abs()).sum(1).max()) <= 1 + 1e-12 for a, b in rows)


def test_interval_gradient_of_a_point_is_the_distance() -> None:
    x, w = (v.requires_grad_() for v in draw(3, 4, 5))
    for end in power_mean_interval(x, x, w, 8.0):
        got = torch.autograd.grad(end.sum(), [x, w], retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(power_mean(x, w, 8.0).sum(), [x, w]), strict=True):
            torch.testing.assert_close(a, b)


def test_interval_meets_its_weight() -> None:
    """Zero distance, zero gradient; equally far ends credit the lower one."""
    w = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    lower, upper = (torch.full((1, 2), v, dtype=torch.float64, requires_grad=True) for v in (-1.0, 1.0))
    low, high = power_mean_interval(lower, upper, w, 4.0)
    grads = torch.autograd.grad(low.sum(), [lower, upper, w], retain_graph=True)
    assert low.item() == 0 and not any(g.any() for g in grads)
    down, up = torch.autograd.grad(high.sum(), [lower, upper])
    assert not up.any() and float(down.sum()) == pytest.approx(-1)


def test_interval_operators_and_transforms() -> None:
    lower, w = draw(3, 4, 5)
    upper = lower + 0.5
    low, high = power_mean_interval(lower, upper, w, 8.0)
    operators, ends = torch.ops.dplip, (lower, upper, w)
    torch.library.opcheck(operators.power_mean_interval.default, (*ends, 8.0))
    for need in [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]:
        torch.library.opcheck(
            operators.power_mean_interval_backward.default, (*ends, low, high, low.clone(), high.clone(), 8.0, *need)
        )

    def width(lower: Tensor, upper: Tensor, w: Tensor) -> Tensor:
        low, high = power_mean_interval(lower, upper, w, 8.0)
        return (high.square() - low).sum()

    def alone(lower: Tensor, upper: Tensor, w: Tensor) -> Tensor:
        return width(lower[None], upper[None], w)

    whole = torch.func.grad(width, (0, 1, 2))(*ends)
    mapped = torch.func.vmap(torch.func.grad(alone, (0, 1, 2)), (0, 0, None))(*ends)
    for a, b in zip((*mapped[:2], mapped[2].sum(0)), whole, strict=True):
        torch.testing.assert_close(a, b)
    by_inputs = torch.func.vmap(torch.func.grad(alone, (0, 1)), (0, 0, None))(*ends)
    torch.testing.assert_close(by_inputs, whole[:2])
    lower.requires_grad_()
    (first,) = torch.autograd.grad(power_mean_interval(lower, upper, w, 8.0)[0].sum(), lower, create_graph=True)
    with pytest.raises(NotImplementedError, match="power_mean_interval: expected one derivative"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [2.0, 3.0, 8.0, 24.0, 64.0, 7.5, 1000.0])
def test_fast_paths_are_the_reference(p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every scale, with examples of very different ones, a lone large entry, NaN and infinity."""
    x, w = (v.to(dtype) for v in draw(8, 5, 40))
    dy = torch.randn(8, 5, dtype=dtype)
    x *= torch.logspace(-18, 18, 8, dtype=dtype)[:, None]
    x[3], x[4, 7] = w[2], 1e9
    broken = x.clone()
    broken[0, 0], broken[5, 3] = float("nan"), float("inf")

    def run(x: Tensor) -> list[Tensor]:
        operators, y = torch.ops.dplip, torch.ops.dplip.power_mean(x, w, p)
        ends = operators.power_mean_interval(x - 0.1, x + 0.1, w, p)
        rest = operators.power_mean_weight_grad(x, w, y, dy, p), operators.power_mean_ghost_norm(x, w, y, dy, p)
        return [y, *ends, *operators.power_mean_backward(x, w, y, dy, p, True, True), *rest]

    fast, unfit = run(x), run(broken)
    monkeypatch.setenv("DPLIP_KERNELS", "reference")
    slack = (8 * p + 40) * torch.finfo(dtype).eps
    for got, expected in zip(fast, run(x), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=slack, atol=slack)
    for got, expected in zip(unfit[:3], run(broken)[:3], strict=True):
        assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize("p", [1.0, 1.99, -2.0, float("inf"), float("nan")])
def test_exponents_without_a_bound_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="2 <= p < inf"):
        power_mean(torch.zeros(1, 2), torch.zeros(1, 2), p)


def test_operands_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="power_mean: expected x"):
        power_mean(torch.zeros(2, 3), torch.zeros(4, 5), 2.0)
    with pytest.raises(ValueError, match="power_mean_interval: expected"):
        power_mean_interval(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 5), 2.0)
