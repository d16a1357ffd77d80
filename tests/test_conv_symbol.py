# SPDX-License-Identifier: Apache-2.0
"""The largest singular value over a period against all of them, wherever the largest is."""

import math

import pytest
import torch
from torch import Tensor

from dplip import conv_symbol
from dplip.conv_symbol import symbol_bound
from dplip.operator_norm import gram_iteration

PERIODS = [(8, 12), (7, 5), (1, 9), (32, 16)]


def exact(kernel: Tensor, period: tuple[int, int]) -> float:
    """The SVD at every frequency."""
    theta = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) * 2 * math.pi / n for n in period))
    at = torch.cartesian_prod(*(torch.arange(n) for n in kernel.shape[3:]))
    turns = torch.exp(1j * (theta @ at.double().T))  # [N, U V]
    symbols = torch.einsum("nt,goit->ngoi", turns, kernel.flatten(3).to(turns.dtype))
    return float(torch.linalg.svdvals(symbols).amax())


def kernels(groups: int, o: int, i: int) -> dict[str, Tensor]:
    torch.manual_seed(o + i)
    shape = (groups, o, i, 3, 3)
    even, odd = torch.ones(shape).double(), torch.ones(shape).double()
    odd[..., 1::2, :] *= -1
    odd[..., :, 1::2] *= -1
    flat = torch.zeros(shape).double()  # every frequency has the same singular values
    flat[:, :, :, 1, 1] = torch.nn.init.orthogonal_(torch.empty(o, i).double())
    unlike = torch.rand(shape).double()
    unlike[0] *= 1e-9
    return {
        "random": torch.randn(shape).double().clamp(-1, 1),
        "low frequencies": even,
        "high frequencies": odd / 2,
        "flat": flat,
        "unlike groups": unlike,
        "zero": torch.zeros(shape).double(),
        "wide range": torch.rand(shape).double() * 10 ** (-40 * torch.rand(shape).double()),
        "one entry": torch.nn.functional.pad(torch.ones(groups, 1, 1, 1, 1), (2, 0, 1, 1, i - 1, 0, 0, o - 1)).double(),
    }


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("chunk", [1, 600, 1 << 17])
@pytest.mark.parametrize("sides", [(1, 4, 1), (2, 5, 3), (1, 16, 17), (1, 18, 20)], ids=str)
def test_never_below_the_largest_and_close(
    sides: tuple[int, int, int], chunk: int, ranked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one frequency see the largest first, last or in between."""
    monkeypatch.setattr(conv_symbol, "_CHUNK", chunk)
    if not ranked:
        monkeypatch.setattr(conv_symbol, "_ROUGH_ERROR", 0.0)
    for name, kernel in kernels(*sides).items():
        for period in PERIODS:
            true, bound = exact(kernel, period), symbol_bound(kernel, period)
            near = 1e-7 if min(sides[1:]) <= conv_symbol.EIGEN_SIDE else 0.01
            assert true * (1 - 1e-14) <= bound <= true * (1 + near) + 1e-140, (name, period)


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("side", [3, 20])
@pytest.mark.parametrize("shape", [(1, 0), (-1, 0), (1, -1), (-1, -1), (4 * math.cos(15 * math.pi / 32), -1)], ids=str)
def test_almost_equal_frequencies(
    shape: tuple[float, float], side: int, ranked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What separates the largest from the others is below, near or above the rounding of float32; it lies anywhere."""
    monkeypatch.setattr(conv_symbol, "_ROUGH_ERROR", 1.0 if ranked else 0.0)
    monkeypatch.setattr(conv_symbol, "_CHUNK", 1)
    torch.manual_seed(0)
    q = torch.nn.init.orthogonal_(torch.empty(side, side, dtype=torch.float64))
    q[:, 1:] *= 0.1  # one singular value stands out, so the bounds of float32 are as sharp as they get
    for gap in (1e-15, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1e-2):
        factors = torch.tensor([gap * shape[1], gap * shape[0], 1.0], dtype=torch.float64)
        kernel = q[None, :, :, None, None] * factors[:, None]
        true, tight = exact(kernel, (64, 1)), 1e-10 if side <= conv_symbol.EIGEN_SIDE else 0.01
        assert true * (1 - 1e-14) <= symbol_bound(kernel, (64, 1)) <= true * (1 + tight)


def test_a_frequency_that_float32_cannot_see() -> None:
    """Where magnitudes cancel, float32 ranks by its own rounding: the largest may come last, and is found."""
    torch.manual_seed(0)
    kernel = torch.zeros(1, 6, 6, 1, 9, dtype=torch.float64)
    kernel[0, :, :, 0, ::2] = torch.randn(6, 6, 1).double().clamp(-1, 1)
    kernel[0, :, :, 0, 1::2] = -kernel[0, :, :, 0, :1] * (1 + 1e-6 * torch.rand(6, 6, 4).double())
    for period in ((1, 9), (1, 16), (1, 64)):
        true = exact(kernel, period)
        assert true * (1 - 1e-14) <= symbol_bound(kernel, period) <= true * (1 + 1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_the_first_pass_never_ranks_a_frequency_below_its_value(seed: int) -> None:
    """The bounds of float32, widened as the search widens them, hold for every matrix."""
    torch.manual_seed(seed)
    side, other = int(torch.randint(2, 40, ())), int(torch.randint(40, 200, ()))
    spread = torch.logspace(0, -float(torch.randint(0, 8, ())), side, dtype=torch.float64)
    wide = torch.randn(12, side, other, dtype=torch.complex128) * spread[:, None]
    true = torch.linalg.svdvals(wide)[:, 0]
    for matrices in (wide, wide.mT):
        single = gram_iteration(matrices.to(torch.complex64), conv_symbol._ROUGH_SQUARINGS)
        rounded = torch.linalg.svdvals(matrices.to(torch.complex64).to(torch.complex128))[:, 0]
        assert bool((single >= rounded).all())
        assert bool((gram_iteration(matrices, conv_symbol._SQUARINGS) >= true * (1 - 1e-14)).all())
