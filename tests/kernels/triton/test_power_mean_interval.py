# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the power mean's range against the reference in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dplip.kernels.power_mean_interval import _backward_reference, power_mean_interval_reference

kernels = pytest.importorskip("dplip.kernels.triton.power_mean_interval")

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter computes in NumPy


def draw(b: int, o: int, i: int, device: str, scale: float = 1.0) -> list[Tensor]:
    """``lower``, ``upper``, ``w`` and both ends' cotangents; some coordinates are points, the last box holds ``w``."""
    generator = torch.Generator().manual_seed(b + 10 * o + 100 * i)
    lower, w = (torch.randn(n, i, generator=generator) for n in (b, o))
    upper = lower + torch.rand(b, i, generator=generator).relu() * 2
    upper[:, ::3] = lower[:, ::3]
    lower[-1:], upper[-1:] = -9.0, 9.0
    dlow, dhigh = (torch.randn(b, o, generator=generator) for _ in range(2))
    return [v.to(device) for v in (scale * lower, scale * upper, scale * w, dlow, dhigh)]


def check(operands: list[Tensor], p: float, **options: Any) -> None:
    wide = [v.double() for v in operands]
    expected = power_mean_interval_reference(*wide[:3], p)
    low, high = kernels.forward(*operands[:3], p)
    for got, end in zip((low, high), expected, strict=True):
        torch.testing.assert_close(got.double(), end, rtol=1e-6, atol=0)
    grads = _backward_reference(*wide[:3], *expected, *wide[3:], p, True, True, True)
    for got, grad in zip(kernels.backward(*operands[:3], low, high, *operands[3:], p, **options), grads, strict=True):
        slack = 1e-6 * (p + 4)
        torch.testing.assert_close(got.double(), grad, rtol=slack, atol=slack * float(grad.abs().max()))


@pytest.mark.parametrize("p", [2.0, 3.0, 8.0, 64.0, 7.5, 128.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 13)])
def test_both_ends_and_their_gradients(shape: tuple[int, int, int], p: float, device: str) -> None:
    check(draw(*shape, device), p)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale: float, device: str) -> None:
    check(draw(5, 7, 13, device, scale), 8.0)


@pytest.mark.parametrize("config", kernels.BACKWARD_CONFIGS)
def test_every_backward_launch(config: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(draw(9, 5, 35, device), 8.0, config=config)
    monkeypatch.setattr(kernels, "PARTS", 1)
    monkeypatch.setattr(kernels, "processors", lambda device: 50)
    check(draw(9, 19, 35, device), 8.0, config=config)


def test_every_forward_launch(device: str) -> None:
    lower, upper, w = draw(9, 17, 19, device)[:3]
    expected = power_mean_interval_reference(lower.double(), upper.double(), w.double(), 8.0)
    for config in kernels.CONFIGS:
        for got, end in zip(kernels.forward(lower, upper, w, 8.0, config), expected, strict=True):
            torch.testing.assert_close(got.double(), end, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [8.0, 7.5])
def test_not_a_number_and_infinity(p: float, device: str) -> None:
    lower, upper, w = draw(5, 7, 13, device)[:3]
    lower[0, 1], upper[1, 2], w[3, 4], upper[2, 5] = math.nan, math.nan, math.nan, math.inf
    for got, end in zip(
        kernels.forward(lower, upper, w, p), power_mean_interval_reference(lower, upper, w, p), strict=True
    ):
        assert torch.equal(got.isnan(), end.isnan())
        torch.testing.assert_close(got, end, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2)])
def test_empty(shape: tuple[int, int, int], device: str) -> None:
    lower, upper, w, dlow, dhigh = (
        torch.zeros(s, device=device) for s in ((shape[0], 2),) * 2 + ((shape[1], 2),) + (shape[:2],) * 2
    )
    low, high = kernels.forward(lower, upper, w, 8.0)
    assert low.shape == high.shape == dlow.shape
    grads = kernels.backward(lower, upper, w, low, high, dlow, dhigh, 8.0)
    assert [g.shape for g in grads] == [lower.shape, upper.shape, w.shape] and not any(g.any() for g in grads)
    assert kernels.backward(lower, upper, w, low, high, dlow, dhigh, 8.0, False, True, False)[0].numel() == 0


def test_float64_is_refused(device: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="power_mean: expected at most float32"):
        kernels.forward(x, x, x, 2.0)
