# SPDX-License-Identifier: Apache-2.0
"""The spline kernels against the float64 reference: in the interpreter, or on a GPU where there is one."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dplip.kernels.dispatch import select
from dplip.kernels.linear_spline import (
    linear_spline,
    linear_spline_backward_reference,
    linear_spline_coefficient_grad_reference,
    linear_spline_reference,
)
from dplip.kernels.triton import linear_spline as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    (1, 1, 1, 2),
    (3, 2, 5, 3),
    (7, 5, 1, 22),
    (2, 33, 3, 8),
    (5, 1, 301, 50),
    (19, 2, 1, 9),
    (0, 3, 4, 5),
    (2, 0, 3, 4),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several examples a run, the last run short."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "_PROGRAMS", 5)


def draw(b: int, c: int, s: int, knots: int, reach: float = 0.7) -> tuple[Tensor, ...]:
    """Inputs on knots, at and next to the ends, far beyond, and at random; coefficients, end slopes and cotangents."""
    x = 1.5 * reach * torch.randn(b, c, s)
    grid = torch.linspace(-reach, reach, knots)
    special = torch.cat([grid, grid[[0, -1]].nextafter(2 * grid[[0, -1]]), 1e30 * grid[[0, -1]], torch.tensor([1e-40])])
    flat = x.view(-1)
    n = min(len(flat) // 2, len(special))
    flat[:n] = special[torch.randperm(len(special))[:n]]
    tensors = (x, torch.randn(c, knots), torch.randn(c, 2), torch.randn(b, c, s))
    return tuple(t.to(DEVICE) for t in tensors)


def close(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=2e-5, atol=2e-5 * scale)


def near_knots(x: Tensor, reach: float, knots: int) -> Tensor:
    """Where float32 and float64 may see different pieces."""
    t = (x.double() + reach) * ((knots - 1) / (2 * reach))
    return (t - t.round()).abs() < 1e-4 * (knots - 1)


@pytest.mark.parametrize("with_ends", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, int, int, int], with_ends: bool) -> None:
    x, table, ends, _ = draw(*shape)
    ends = ends if with_ends else None
    expected = linear_spline_reference(x.double(), table.double(), 0.7, None if ends is None else ends.double())
    close(kernels.forward(x, table, 0.7, ends), expected, scale=10)


@pytest.mark.parametrize("with_ends", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape: tuple[int, int, int, int], with_ends: bool) -> None:
    x, table, ends, dy = draw(*shape)
    ends = ends if with_ends else None
    dx, dc = kernels.backward(x, table, 0.7, ends, dy, True, True)
    expected = linear_spline_backward_reference(x, table, 0.7, ends, dy, True, True)
    close(dx, expected[0], scale=10)
    exact = linear_spline_backward_reference(
        x.double(), table.double(), 0.7, None if ends is None else ends.double(), dy.double(), True, True
    )
    close(dc, exact[1], scale=10)
    away = ~near_knots(x, 0.7, shape[3])
    close(dx[away], exact[0][away], scale=10)
    per_example = kernels.coefficient_grad(x, shape[3], 0.7, dy)
    close(per_example, linear_spline_coefficient_grad_reference(x.double(), shape[3], 0.7, dy.double()), scale=10)
    for need in ((True, False), (False, True)):
        parts = kernels.backward(x, table, 0.7, ends, dy, *need)
        assert all(torch.equal(p, w if n else w.new_empty(0)) for p, w, n in zip(parts, (dx, dc), need, strict=True))


def test_inputs_on_knots_have_the_reference_slope() -> None:
    """Powers of two, so that float32 knows exactly where the knots are."""
    knots = torch.linspace(-1, 1, 9, device=DEVICE)
    x = torch.cat([knots, knots[[0, -1]] * (1 + 1e-6)])[:, None, None].contiguous()
    table, ends = torch.randn(1, 9, device=DEVICE), torch.tensor([[3.0, -2.0]], device=DEVICE)
    dy = torch.ones_like(x)
    dx, _ = kernels.backward(x, table, 1.0, ends, dy, True, False)
    close(
        dx,
        linear_spline_backward_reference(x.double(), table.double(), 1.0, ends.double(), dy.double(), True, False)[0],
    )


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_inputs(value: float) -> None:
    x = torch.full((2, 3, 1), value, device=DEVICE)
    table, ends = torch.randn(3, 6, device=DEVICE), torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.0]], device=DEVICE)
    got = kernels.forward(x, table, 1.0, ends)
    torch.testing.assert_close(got, linear_spline_reference(x, table, 1.0, ends))
    dx, dc = kernels.backward(x, table, 1.0, ends, torch.ones_like(x), True, True)
    expected = linear_spline_backward_reference(x, table, 1.0, ends, torch.ones_like(x), True, True)
    torch.testing.assert_close((dx, dc), expected)


def test_nan_stays_visible_and_in_its_channel() -> None:
    x = torch.zeros(2, 3, 2, device=DEVICE)
    x[1, 1, 0] = torch.nan
    table = torch.randn(3, 5, device=DEVICE)
    assert torch.equal(kernels.forward(x, table, 1.0, None).isnan(), x.isnan())
    per_example = kernels.coefficient_grad(x, 5, 1.0, torch.ones_like(x))
    assert per_example[1, 1].isnan().any()
    per_example[1, 1] = 0
    assert per_example.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPLIP_KERNELS", "triton")
    x, table, ends, dy = (t.to(dtype) for t in draw(3, 2, 5, 8))
    x = x.clamp(-2, 2)
    got = select("linear_spline", x.device.type)(x, table, 0.7, ends)
    assert got.dtype == dtype
    expected = linear_spline_reference(x.double(), table.double(), 0.7, ends.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=3e-2 if dtype != torch.float64 else 1e-9)
    grads = select("linear_spline_backward", x.device.type)(x, table, 0.7, ends, dy, True, True)
    assert [t.dtype for t in grads] == [dtype, dtype]


def test_views_are_read_as_they_are() -> None:
    x, table, _, dy = draw(4, 3, 10, 7)
    part = x[::2, :, 1::3]
    assert torch.equal(kernels.forward(part, table, 0.7, None), kernels.forward(part.contiguous(), table, 0.7, None))
    cut = dy[::2, :, 1::3]
    got = kernels.backward(part, table, 0.7, None, cut, True, True)
    for a, b in zip(
        got, kernels.backward(part.contiguous(), table, 0.7, None, cut.contiguous(), True, True), strict=True
    ):
        assert torch.equal(a, b)


def test_through_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPLIP_KERNELS", "triton")
    x, table, ends, _ = draw(5, 2, 3, 6)
    leaves = x.requires_grad_(), table.requires_grad_()
    grads = torch.autograd.grad(linear_spline(x, table, 0.7, ends).square().sum(), leaves)
    monkeypatch.setenv("DPLIP_KERNELS", "reference")
    expected = torch.autograd.grad(linear_spline(x, table, 0.7, ends).square().sum(), leaves)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 1024, 1, 21), (256, 64, 1024, 50)])
def test_large_and_deterministic(shape: tuple[int, int, int, int]) -> None:
    x, table, ends, dy = draw(*shape)
    first = kernels.backward(x, table, 0.7, ends, dy, True, True)
    exact = linear_spline_backward_reference(x.double(), table.double(), 0.7, ends.double(), dy.double(), True, True)
    torch.testing.assert_close(first[1].double(), exact[1], rtol=1e-4, atol=1e-2)
    for _ in range(20):
        again = kernels.backward(x, table, 0.7, ends, dy, True, True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
