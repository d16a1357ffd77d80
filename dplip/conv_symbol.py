# SPDX-License-Identifier: Apache-2.0
r"""The largest singular value of a convolution's symbol over the frequencies of a period, rounded up.

A kernel ``K_u`` has the symbol ``K(theta) = sum_u K_u exp(i <u, theta>)``, a matrix for every frequency. Where float32
is enough, a few squarings of Gram iteration in it (:func:`dplip.operator_norm.gram_iteration`) rank the frequencies by
bounds that include the rounding, and float64 looks at the most promising first, until no other can exceed what was
found: by eigenvalues where the matrix has a short side, else by more squarings, in which what cannot exceed it is
dropped. Never power iteration, a lower bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.operator_norm import UNIT, gram_error, gram_iteration, gram_iteration_error, grams

__all__ = ["symbol_bound"]

EIGEN_SIDE = 16
"""Symbols with a side up to this get eigenvalues."""

_SINGLE_UNIT = 2.0**-24
_ROUGH_SQUARINGS = 3
_ROUGH_ERROR = 2.5e-3  # more rounding than this, and float32 would tell too few frequencies apart
_SQUARINGS = 7  # excess below rank^(1/512) - 1: 0.8 % for 64 channels
_CHUNK = 1 << 17  # entries of symbols at a time: they stay in a cache
_SPREAD = 16  # distance of the frequencies that are looked at first where float32 has not ranked them
_BLOCK = 8  # frequencies that float64 looks at before the rest are compared with what it found


def symbol_bound(kernel: Tensor, period: tuple[int, int]) -> float:
    """Upper bound on ``max sigma(K(theta))`` over the frequencies of ``period``.

    Args:
        kernel: [G, O, I, U, V] in float64, groups being convolutions of their own; its largest magnitude between 1/2
            and 1 (:func:`dplip.operator_norm.unit_scale`), so that squares of what matters do not underflow, or 0.
        period: number of frequencies along each axis.
    """
    groups, o, i, *shape = kernel.shape
    taps = kernel.permute(3, 4, 0, 1, 2).reshape(-1, groups * o * i).to(torch.complex128)  # [U V, G O I]
    down, along = (_turns(n, t).to(kernel.device) for n, t in zip(period, shape, strict=True))

    def symbols(at: Tensor, taps: Tensor = taps) -> Tensor:
        turns = down[at // period[1], :, None] * along[at % period[1], None]  # [N, U, V]
        return (turns.flatten(1).to(taps.dtype) @ taps).view(-1, o, i)

    # A turn errs by 40 u, a complex sum of n terms by 4 n u, relative to the matrix of sums of magnitudes.
    magnitude = float(torch.linalg.matrix_norm(kernel.abs().sum((3, 4))).amax())
    error = magnitude * (4 * math.prod(shape) + 64)
    # A real kernel's symbol at -theta is the conjugate of that at theta: half of one axis is enough.
    every = torch.arange((period[0] // 2 + 1) * period[1], device=kernel.device)
    chunk, found = max(1, _CHUNK // max(taps.shape)), 0.0
    rough = kernel.new_full(every.shape, math.inf)
    if _ranks_in_float32(kernel):
        single = taps.to(torch.complex64)
        first = [gram_iteration(symbols(at, single), _ROUGH_SQUARINGS) for at in every.split(chunk)]
        rough = torch.cat(first).view(-1, groups).amax(1) + error * _SINGLE_UNIT
        blocks = rough.argsort(descending=True).split(_BLOCK)
    else:  # the first few lie all over the period
        blocks = torch.cat([every[k::_SPREAD] for k in range(_SPREAD)]).split(chunk)
    for at in blocks:
        if float(rough[at[0]]) <= found:
            break
        found = max(found, _largest_sigma(symbols(at), found))
    return found + error * UNIT


def _ranks_in_float32(kernel: Tensor) -> bool:
    """Where a first pass in float32 pays: its rounding is known, which TF32 on a GPU would make it not, and small."""
    side, other = sorted(kernel.shape[1:3])
    precise = gram_iteration_error(side, other, _SINGLE_UNIT) <= _ROUGH_ERROR
    return side > 1 and precise and kernel.device.type == "cpu"


def _turns(period: int, taps: int) -> Tensor:
    """``exp(-2 pi i k u / period)`` [period, taps]; products are reduced as integers, so no angle exceeds 2 pi."""
    reduced = torch.outer(torch.arange(period), torch.arange(taps)) % period
    angle = reduced.double() * (-2 * math.pi / period)
    return torch.polar(torch.ones_like(angle), angle)


def _largest_sigma(matrices: Tensor, found: float) -> float:
    """Upper bound on the largest singular value of complex matrices [N, O, I] in float64 where it exceeds ``found``."""
    side, other = sorted(matrices.shape[1:])
    if side > EIGEN_SIDE:
        return float(gram_iteration(matrices, _SQUARINGS, found).amax())
    gram = grams(matrices)
    largest = float(torch.linalg.eigvalsh(gram)[:, -1].amax()) if side > 1 else float(gram.real.amax())
    return math.sqrt(max(0.0, largest) + gram_error(gram, side + other)) * (1 + 4 * UNIT)
