# SPDX-License-Identifier: Apache-2.0
"""The largest singular value over a period against all of them, wherever the largest is."""

import math

import pytest
import torch
from torch import Tensor

from dplip import conv_symbol
from dplip.conv_symbol import symbol_bound

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
        "one entry": torch.nn.functional.pad(torch.ones(groups, 1, 1, 1, 1), (2, 0, 1, 1, i - 1, 0, 0, o - 1)).double(),
    }


@pytest.mark.parametrize("chunk", [1, 600, 1 << 17])
@pytest.mark.parametrize("sides", [(1, 4, 1), (2, 5, 3), (1, 16, 17), (1, 18, 20)], ids=str)
def test_never_below_the_largest_and_close(
    sides: tuple[int, int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one frequency see the largest first, last or in between."""
    monkeypatch.setattr(conv_symbol, "_CHUNK", chunk)
    for name, kernel in kernels(*sides).items():
        for period in PERIODS:
            true, bound = exact(kernel, period), symbol_bound(kernel, period)
            near = 1e-7 if min(sides[1:]) <= conv_symbol.EIGEN_SIDE else 0.01
            assert true * (1 - 1e-14) <= bound <= true * (1 + near) + 1e-140, (name, period)


@pytest.mark.parametrize("side", [3, 20])
def test_almost_equal_frequencies(side: int) -> None:
    """What separates the largest from the others is near the rounding of the bounds that drop the others."""
    torch.manual_seed(0)
    for gap in (1e-15, 1e-12, 1e-9, 1e-6, 1e-3):
        kernel = torch.zeros(1, side, side, 1, 3, dtype=torch.float64)
        kernel[0, :, :, 0, 1] = torch.nn.init.orthogonal_(torch.empty(side, side, dtype=torch.float64))
        kernel[0, 0, 0, 0, 2] = gap
        true = exact(kernel, (1, 24))
        assert true * (1 - 1e-14) <= symbol_bound(kernel, (1, 24)) <= 1.01 * true
