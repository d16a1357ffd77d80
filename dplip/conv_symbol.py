# SPDX-License-Identifier: Apache-2.0
r"""The largest singular value of a convolution's symbol over the frequencies of a period, in float64, rounded up.

A kernel ``K_u`` has the symbol ``K(theta) = sum_u K_u exp(i <u, theta>)``, a matrix for every frequency. Its ``sigma``
comes from eigenvalues where the matrix has a short side, else from Gram iteration: after ``t`` squarings the Frobenius
norm of ``(K* K)^(2^t)`` has ``sigma^(2^(t+1))`` within a factor of the root of the side (Delattre, Barthelemy, Araujo,
Allauzen, Efficient Bound of Lipschitz Constant for Convolutional Layers by Gram Iteration, ICML 2023, theorem 2.1). So
two squarings tell most frequencies from the largest, and those are dropped. Never power iteration, a lower bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.operator_norm import UNIT

__all__ = ["symbol_bound"]

EIGEN_SIDE = 16
"""Symbols with a side up to this get eigenvalues."""

_SQUARINGS = 7  # excess below rank^(1/512) - 1: 0.8 % for 64 channels
_BEFORE_EIGENVALUES = 2  # of them, to single out the matrices worth it: G^4 knows sigma within 1.2 for 16 channels
_CHUNK = 1 << 17  # entries of symbols at a time: they stay in a cache
_BLOCK = 8  # matrices whose eigenvalues are computed before the next are looked at again
_MARGIN = 1e-9  # of lower bounds, in a logarithm: more than the rounding of any upper bound


def symbol_bound(kernel: Tensor, period: tuple[int, int]) -> float:
    """Upper bound on ``max sigma(K(theta))`` over the frequencies of ``period``.

    Args:
        kernel: [G, O, I, U, V] in float64, groups being convolutions of their own; its largest magnitude between 1/2
            and 1 (:func:`dplip.operator_norm.unit_scale`), so that squares of what matters do not underflow, or 0.
        period: number of frequencies along each axis.
    """
    shape, size = kernel.shape[3:], kernel[..., 0, 0].numel()
    taps = kernel.permute(3, 4, 0, 1, 2).reshape(-1, size).to(torch.complex128)  # [U V, G O I]
    down, along = (_turns(n, t).to(kernel.device) for n, t in zip(period, shape, strict=True))
    # A real kernel's symbol at -theta is the conjugate of that at theta: half of one axis is enough.
    turns = (down[: period[0] // 2 + 1, None, :, None] * along[:, None]).flatten(2).flatten(0, 1)
    most = least = -math.inf
    for part in turns.split(max(1, _CHUNK // max(len(taps), size))):
        upper, least = _log_sigma((part @ taps).view(-1, *kernel.shape[1:3]), least)
        most = max(most, upper)
    magnitude = torch.linalg.matrix_norm(kernel.abs().sum((3, 4)))  # [G], of the matrix of sums of magnitudes
    # A turn errs by 40 u, a complex sum of n terms by 4 n u.
    error = float(magnitude.amax()) * (4 * math.prod(shape) + 64) * UNIT
    return math.exp(most) * (1 + 16 * UNIT) + error


def _turns(period: int, taps: int) -> Tensor:
    """``exp(-2 pi i k u / period)`` [period, taps]; products are reduced as integers, so no angle exceeds 2 pi."""
    reduced = torch.outer(torch.arange(period), torch.arange(taps)) % period
    angle = reduced.double() * (-2 * math.pi / period)
    return torch.polar(torch.ones_like(angle), angle)


def _log_sigma(matrices: Tensor, least: float) -> tuple[float, float]:
    """Logarithm of an upper bound on the largest singular value of complex matrices [N, O, I] where it is at least
    ``least``, the logarithm of a lower bound on that of these or other matrices; and the new ``least``.
    """
    side, other = sorted(matrices.shape[1:])
    adjoint = matrices.mH
    grams = power = matrices @ adjoint if matrices.shape[1] == side else adjoint @ matrices
    if side == 1:
        upper = math.log(max(float(grams.real.amax()), 1e-300)) / 2 + 4 * (other + 4) * UNIT
        return upper, max(least, upper - _MARGIN)
    slack = 32 * (other + _SQUARINGS + 8) * math.sqrt(side) * UNIT * (_SQUARINGS + 1)
    upper, log_scale = -math.inf, torch.zeros(len(grams), dtype=torch.float64, device=grams.device)
    for t in range(_SQUARINGS + 1):
        parts = torch.view_as_real(power)  # norms and multiples of complex numbers are many times slower
        norm = torch.linalg.vector_norm(parts.flatten(1), dim=1)
        log_scale = 2 * log_scale + norm.log()
        bounds = log_scale / 2 ** (t + 1) + slack
        upper = float(bounds.amax())
        least = max(least, upper - math.log(side) / 2 ** (t + 2) - 2 * slack - _MARGIN)
        kept = bounds >= least
        if not bool(kept.any()):
            break
        if t == _BEFORE_EIGENVALUES and side <= EIGEN_SIDE:
            return _by_eigenvalues(grams[kept], bounds[kept], other, least)
        if t < _SQUARINGS:
            if not bool(kept.all()):
                grams, parts, norm, log_scale = grams[kept], parts[kept], norm[kept], log_scale[kept]
            power = torch.view_as_complex(parts * norm.clamp_min(1e-300).reciprocal()[:, None, None, None])
            power = power @ power
    return upper, least


def _by_eigenvalues(grams: Tensor, bounds: Tensor, other: int, least: float) -> tuple[float, float]:
    """The same from the eigenvalues of Gram matrices, the most promising first, while they can be the largest."""
    # Forming a Gram matrix and its eigenvalues errs by multiples of u times its trace.
    slack = 64 * (grams.shape[1] + other) * UNIT * float(grams.diagonal(dim1=1, dim2=2).real.sum(1).amax())
    upper = -math.inf
    for block in bounds.argsort(descending=True).split(_BLOCK):
        if float(bounds[block[0]]) < least:
            break
        largest = max(0.0, float(torch.linalg.eigvalsh(grams[block])[:, -1].amax()))
        upper = max(upper, math.log(max(largest + slack, 1e-300)) / 2 + 4 * UNIT)
        least = max(least, math.log(max(largest - slack, 1e-300)) / 2 - _MARGIN)
    return upper, least
