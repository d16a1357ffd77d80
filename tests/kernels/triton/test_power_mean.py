# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the power mean against the reference in float64: interpreted on a CPU, run on a GPU."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dplip.kernels.power_mean import power_mean, power_mean_interval, power_mean_reference, power_mean_rows

kernels = pytest.importorskip("dplip.kernels.triton.power_mean")
gradient = pytest.importorskip("dplip.kernels.triton.power_mean_gradient")

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes in NumPy

SHAPES = [(1, 1, 1), (5, 7, 13)]
EXPONENTS = [2.0, 3.0, 8.0, 10.0, 64.0, 7.5, 128.0, 2000.5]
SMALL = kernels.Config(2, 2, 4, 8, 2, 2, 1)
BROAD = kernels.Config(4, 2, 1, 32, 4, 1, 1)


def draw(shape: tuple[int, int, int], device: str, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    b, o, i = shape
    generator = torch.Generator().manual_seed(b + 10 * o + 100 * i)
    x, w, dy = (torch.randn(s, generator=generator) for s in ((b, i), (o, i), (b, o)))
    return (scale * x).to(device), (scale * w).to(device), dy.to(device)


def exact(x: Tensor, w: Tensor, dy: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Values and per-example weight gradients in float64."""
    x, w, dy = x.double(), w.double(), dy.double()
    y = power_mean_reference(x, w, p)
    return y, -dy.unsqueeze(-1) * power_mean_rows(x[:, None] - w, y, p)


def close(got: Tensor, expected: Tensor, p: float) -> None:
    """A power multiplies the rounding of its base by p."""
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got.double(), expected, rtol=1e-6 * (p + 4), atol=1e-6 * (p + 4) * size)


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_is_the_reference(shape: tuple[int, int, int], p: float, device: str) -> None:
    x, w, dy = draw(shape, device)
    value, grad = exact(x, w, dy, p)
    y = kernels.forward(x, w, p)
    close(y, value, 0)
    dx, dw = gradient.backward(x, w, y, dy, p)
    close(dx, -grad.sum(1), p)
    close(dw, grad.sum(0), p)
    close(gradient.weight_grad(x, w, y, dy, p), grad, p)
    close(gradient.ghost_norm(x, w, y, dy, p), grad.flatten(1).norm(dim=1), p)


@pytest.mark.parametrize("forward", [SMALL, *kernels.CONFIGS])
@pytest.mark.parametrize("p", [8.0, 64.0])
def test_every_forward_launch(forward: Any, p: float, device: str) -> None:
    x, w, dy = draw((9, 17, 19), device)
    close(kernels.forward(x, w, p, forward), exact(x, w, dy, p)[0], 0)


@pytest.mark.parametrize("backward", [SMALL, BROAD, *gradient.BACKWARD_CONFIGS])
@pytest.mark.parametrize("p", [8.0, 7.5])
def test_every_backward_launch(backward: Any, p: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, dy = draw((9, 5, 35), device)
    value, grad = exact(x, w, dy, p)
    for parts in (gradient.PARTS, 1):  # in one go, and one block of examples after another
        monkeypatch.setattr(gradient, "PARTS", parts)
        dx, dw = gradient.backward(x, w, value.float(), dy, p, config=backward)
        close(dx, -grad.sum(1), p)
        close(dw, grad.sum(0), p)


def test_gradients_one_at_a_time(device: str) -> None:
    x, w, dy = draw((5, 7, 13), device)
    y = kernels.forward(x, w, 8.0)
    both = gradient.backward(x, w, y, dy, 8.0)
    dx, nothing = gradient.backward(x, w, y, dy, 8.0, want_w=False)
    assert torch.equal(dx, both[0]) and nothing.numel() == 0
    nothing, dw = gradient.backward(x, w, y, dy, 8.0, want_x=False)
    assert torch.equal(dw, both[1]) and nothing.numel() == 0


def test_many_spans_and_strides(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, gradient):
        monkeypatch.setattr(module, "processors", lambda device: 50)
    x, w, dy = (v.repeat(1, 2)[:, : v.shape[1]] for v in draw((3, 17, 35), device))
    assert not x.is_contiguous()
    for p in (8.0, 64.0):
        value, grad = exact(x, w, dy, p)
        y = kernels.forward(x, w, p, SMALL)
        close(y, value, 0)
        dx, dw = gradient.backward(x, w, y, dy, p, config=BROAD)
        close(dx, -grad.sum(1), p)
        close(dw, grad.sum(0), p)
    close(kernels.forward(x.T.contiguous().T, w, 8.0), exact(x, w, dy, 8.0)[0], 0)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (0, 0, 1)])
def test_empty(shape: tuple[int, int, int], device: str) -> None:
    x, w, dy = draw(shape, device)
    y = kernels.forward(x, w, 8.0)
    assert y.shape == dy.shape
    dx, dw = gradient.backward(x, w, y, dy, 8.0)
    assert dx.shape == x.shape and dw.shape == w.shape and not dx.any() and not dw.any()
    assert gradient.weight_grad(x, w, y, dy, 8.0).shape == (*dy.shape, shape[2])
    assert gradient.ghost_norm(x, w, y, dy, 8.0).tolist() == [0.0] * shape[0]


@pytest.mark.parametrize("p", [2.0, 8.0, 64.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-37, 1e-6, 1e30])
def test_any_scale(scale: float, p: float, device: str) -> None:
    x, w, dy = draw((5, 7, 13), device, scale)
    value, grad = exact(x, w, dy, p)
    y = kernels.forward(x, w, p)
    close(y, value, 0)
    close(gradient.backward(x, w, y, dy, p)[1], grad.sum(0), p)


@pytest.mark.parametrize("p", [8.0, 64.0])
def test_one_tile_of_many_scales(p: float, device: str) -> None:
    """Sums that leave the range in a tile whose others do not: tiny, huge, equal rows and lone large entries."""
    x, w, dy = draw((9, 11, 40), device)
    x *= torch.logspace(-12, 12, 9, device=device)[:, None]
    w[3:] *= torch.logspace(-12, 12, 8, device=device)[:, None]
    x[4], w[5] = w[4], 0
    x[2], x[3, 17] = 0, 1e20
    y, (value, grad) = kernels.forward(x, w, p), exact(x, w, dy, p)
    torch.testing.assert_close(y.double(), value, rtol=3e-7, atol=0)
    assert y[4, 4] == 0 and y[2, 5] == 0
    got = gradient.weight_grad(x, w, y, dy, p)
    close(got, grad, p)
    assert not got[4, 4].any() and not got[2, 5].any()


@pytest.mark.parametrize("p", [8.0, 64.0, 7.5])
def test_not_a_number_and_infinity(p: float, device: str) -> None:
    x, w, dy = draw((5, 7, 13), device)
    x[1, 3], w[2, 5], x[3, 0], w[4, 12] = math.nan, math.nan, math.inf, -math.inf
    y = kernels.forward(x, w, p)
    touched = torch.zeros(5, 7, dtype=torch.bool, device=device)
    touched[[1, 3]], touched[:, [2, 4]] = True, True
    assert torch.equal(y.isnan(), touched)
    assert torch.equal(y.isnan(), power_mean_reference(x, w, p).isnan())
    grad = gradient.weight_grad(x, w, y, dy, p)
    assert torch.equal(grad.isnan().any(-1), touched)
    assert gradient.backward(x, w, y, dy, p)[0].isnan().any(1).tolist() == [True] * 5
    assert gradient.ghost_norm(x, w, y, dy, p).isnan().all()


def test_subnormal_distances(device: str) -> None:
    """Values are right to the subnormal spacing; a distance below the smallest normal number has gradient 0."""
    x, w, dy = draw((3, 4, 6), device, 1e-40)
    for p in (8.0, 64.0, 7.5):
        y = kernels.forward(x, w, p)
        torch.testing.assert_close(y.double(), exact(x, w, dy, p)[0], rtol=0, atol=2e-44)
        assert not gradient.backward(x, w, y, dy, p)[0].any()
        assert not gradient.weight_grad(x, w, y, dy, p).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [8.0, 1000.0])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, p: float, device: str) -> None:
    x, w, dy = draw((5, 7, 13), device)
    x, w = x.to(dtype), w.to(dtype)
    value, grad = exact(x, w, dy, p)
    y = kernels.forward(x, w, p)
    assert y.dtype == torch.float32
    close(y, value, 0)
    dx, dw = gradient.backward(x, w, y, dy, p)
    close(dx, -grad.sum(1), p)
    close(dw, grad.sum(0), p)


def test_float64_is_refused(device: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="power_mean: expected at most float32"):
        kernels.forward(x, x, 2.0)


@pytest.mark.parametrize("p", [2.0, 8.0, 64.0, 1000.0])
def test_rows_keep_their_bound(p: float, device: str) -> None:
    """The l_1 norm of a Jacobian row is at most 1, ties and one-hot rows included."""
    base = torch.cat([torch.randn(4, 9), torch.ones(1, 9), torch.eye(9)[:2], torch.randn(2, 9).sign()]).to(device)
    w, ones = torch.zeros(1, 9, device=device), torch.ones(9, 1, device=device)
    for scale in (1e-20, 1.0, 1e20):
        x = scale * base
        y = kernels.forward(x, w, p)
        row = gradient.backward(x, w, y, ones, p, want_w=False)[0]
        assert float(row.double().abs().sum(1).max()) <= 1 + 4 * p * 2.0**-24 + 1e-6


def test_chosen_by_name(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPLIP_KERNELS", "triton")
    x, w, dy = draw((5, 7, 13), device)
    grads = []
    for operands in ((x, w), (x.half(), w.half())):
        leaves = [v.clone().requires_grad_() for v in operands]
        low, high = power_mean_interval(leaves[0] - 0.5, leaves[0] + 0.5, leaves[1], 8.0)
        y = power_mean(*leaves, 8.0)
        assert y.dtype == torch.float32 and bool(((low <= y) & (y <= high)).all())
        grads.append(torch.autograd.grad((dy * (y + low - high)).sum(), leaves))
    for a, b, v in zip(*grads, (x, w), strict=True):
        assert a.dtype == v.dtype and b.dtype == torch.float16
        torch.testing.assert_close(b.float(), a, rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [8.0, 64.0, 100.0, 1000.0, 7.5])
def test_large_on_a_gpu(p: float) -> None:
    x, w, dy = draw((300, 513, 777), "cuda")
    value, grad = exact(x, w, dy, p)
    y = kernels.forward(x, w, p)
    close(y, value, 0)
    dx, dw = gradient.backward(x, w, y, dy, p)
    close(dx, -grad.sum(1), p)
    close(dw, grad.sum(0), p)
    close(gradient.ghost_norm(x, w, y, dy, p), grad.flatten(1).norm(dim=1), p)


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    x, w, dy = draw((300, 513, 777), "cuda")
    for p in (8.0, 64.0, 7.5):
        y = kernels.forward(x, w, p)
        first = (y, *gradient.backward(x, w, y, dy, p), gradient.ghost_norm(x, w, y, dy, p))
        for _ in range(20):
            again = kernels.forward(x, w, p)
            for a, b in zip(
                first, (again, *gradient.backward(x, w, y, dy, p), gradient.ghost_norm(x, w, y, dy, p)), strict=True
            ):
                assert torch.equal(a, b)
