# SPDX-License-Identifier: Apache-2.0
r"""The largest singular value of a convolution's symbol over the frequencies of a period, rounded up.

A kernel ``K_u`` has the symbol ``K(theta) = sum_u K_u exp(i <u, theta>)``, a matrix for every frequency. After ``t``
squarings of its Gram matrix the Frobenius norm has ``sigma^(2^(t+1))`` within a factor of the root of the side, from
above (Delattre, Barthelemy, Araujo, Allauzen, Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram
Iteration, ICML 2023, theorem 2.1). Where float32 is enough, a few squarings in it rank the frequencies by bounds that
include the rounding, and float64 looks at the most promising first, until no other can exceed what was found: by
eigenvalues where the matrix has a short side, else by more squarings, in which what cannot exceed it is dropped. Never
power iteration, a lower bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.operator_norm import UNIT, gram_iteration_error

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
        first = [_gram_iteration(symbols(at, single), _ROUGH_SQUARINGS) for at in every.split(chunk)]
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
        return float(_gram_iteration(matrices, _SQUARINGS, found).amax())
    grams = _grams(matrices)
    largest = float(torch.linalg.eigvalsh(grams)[:, -1].amax()) if side > 1 else float(grams.real.amax())
    # Forming a Gram matrix and its eigenvalues errs by multiples of u times its trace.
    slack = 64 * (side + other) * UNIT * float(grams.diagonal(dim1=1, dim2=2).real.sum(1).amax())
    return math.sqrt(max(0.0, largest) + slack) * (1 + 4 * UNIT)


def _gram_iteration(matrices: Tensor, squarings: int, found: float = 0.0) -> Tensor:
    """Upper bounds [N] on the largest singular values of complex matrices [N, O, I], sharp where above ``found``."""
    side, other = sorted(matrices.shape[1:])
    unit = _SINGLE_UNIT if matrices.dtype == torch.complex64 else UNIT
    slack = gram_iteration_error(side, other, unit)
    power, log_scale = _grams(matrices), torch.zeros(len(matrices), dtype=torch.float64, device=matrices.device)
    bounds, left = torch.empty_like(log_scale), torch.arange(len(matrices), device=matrices.device)
    for t in range(squarings + 1):
        parts = torch.view_as_real(power)  # norms and multiples of complex numbers are many times slower
        norm = torch.linalg.vector_norm(parts.flatten(1), dim=1)
        log_scale = 2 * log_scale + norm.double().log()
        if t == squarings or found > 0:
            bounds[left] = now = (log_scale / 2 ** (t + 1)).exp() * (1 + slack)
            kept = now > found
            if t == squarings or not bool(kept.any()):
                break
            if not bool(kept.all()):
                left, parts, norm, log_scale = left[kept], parts[kept], norm[kept], log_scale[kept]
        inverse = norm.clamp_min(torch.finfo(norm.dtype).tiny).reciprocal()
        shrunk = torch.view_as_complex(parts * inverse[:, None, None, None])
        power = shrunk @ shrunk
    return bounds


def _grams(matrices: Tensor) -> Tensor:
    """``A A*`` or ``A* A``, whichever is smaller."""
    adjoint = matrices.mH
    return matrices @ adjoint if matrices.shape[1] <= matrices.shape[2] else adjoint @ matrices
