# SPDX-License-Identifier: Apache-2.0
"""Rigorous upper bounds on the operator norms of a concrete matrix, in float64.

Row and column norms are exact up to rounding. The spectral norm comes from the Gram matrix of the shorter side: its
eigenvalues up to :data:`EIGEN_LIMIT`, beyond it a Cholesky factorisation that exists only if a proposed bound holds,
and Gram iteration for what is too long to factorise. Power iteration is never used as a bound: it approaches the norm
from below, so whatever rests on it (a certificate, a noise scale) is wrong by the unknown gap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.norms import OperatorNorms

__all__ = [
    "CHOLESKY_LIMIT",
    "EIGEN_LIMIT",
    "UNIT",
    "gram_bound",
    "gram_error",
    "gram_iteration",
    "gram_iteration_error",
    "grams",
    "matrix_norms",
    "round_up",
    "spectral_bound",
    "spectral_estimate",
    "unit_scale",
]

EIGEN_LIMIT = 256
"""Shorter sides up to this get all eigenvalues."""
CHOLESKY_LIMIT = 8192
"""Shorter sides up to this are certified by a factorisation."""
_BLOCK = 1 << 16
_COLUMNS = 256
UNIT = 2.0**-53
"""Unit roundoff of float64."""


def round_up(value: float, terms: int) -> float:
    """``value`` raised by the rounding error of a float64 computation with ``terms`` operations."""
    return value * (1 + 4 * (terms + 4) * UNIT)


def unit_scale(weight: Tensor) -> tuple[Tensor, float]:
    """``weight`` in float64 divided by a power of two, and that power: squares of tiny entries do not underflow.

    The power is 0 for a zero matrix and ``inf`` where an entry is not finite.
    """
    w, largest = weight.detach(), _largest(weight)
    if not 0 < largest < math.inf:  # NaN included
        return w.to(torch.float64), 0.0 if largest == 0 else math.inf
    power = 2.0 ** max(-1000, min(1000, math.frexp(largest)[1]))
    return (w / power if w.dtype == torch.float64 else w.to(torch.float64).div_(power)), power


def _largest(weight: Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 without entries."""
    if weight.numel() == 0:
        return 0.0
    low, high = torch.aminmax(weight.detach())
    return float(torch.maximum(low.abs(), high.abs()))  # NaN stays NaN


def gram_bound(weight: Tensor, iterations: int = 10) -> float:
    """Upper bound on the largest singular value by :func:`gram_iteration`; ``inf`` where an entry is not finite."""
    w, power = unit_scale(weight)
    if power == 0 or math.isinf(power):
        return power
    return float(gram_iteration(w[None], iterations)) * power


def gram_iteration(matrices: Tensor, squarings: int, found: float = 0.0) -> Tensor:
    """Upper bounds [N] on the largest singular values of real or complex matrices [N, O, I], in float64.

    ``G_0 = W W*``, ``G_{t+1} = G_t^2`` with the scale kept in log space; ``sigma <= ||G_t||_F^(1/2^(t+1))`` holds at
    *every* ``t`` and tightens to equality (relative excess at most ``rank^(1/2^(t+2)) - 1``). A matrix whose bound does
    not exceed ``found`` is left at that.

    Source: Delattre, Barthelemy, Araujo, Allauzen, Efficient Bound of Lipschitz Constant for Convolutional
    Layers by Gram Iteration, ICML 2023, theorem 2.1.
    """
    side, other = sorted(matrices.shape[1:])
    slack = gram_iteration_error(side, other, torch.finfo(matrices.dtype).eps / 2)
    power = grams(matrices)
    log_scale = torch.zeros(len(matrices), dtype=torch.float64, device=matrices.device)
    bounds, left = torch.empty_like(log_scale), torch.arange(len(matrices), device=matrices.device)
    for t in range(squarings + 1):
        # Norms and multiples of complex numbers are many times slower than of their parts.
        parts = torch.view_as_real(power) if power.is_complex() else power[..., None]
        norm = torch.linalg.vector_norm(parts.flatten(1), dim=1)
        log_scale = 2 * log_scale + norm.double().log()
        if t == squarings or found > 0:
            bounds[left] = now = (log_scale / 2 ** (t + 1)).exp() * (1 + slack)
            kept = now > found
            if t == squarings or not bool(kept.any()):
                break
            if not bool(kept.all()):
                left, parts, norm, log_scale = left[kept], parts[kept], norm[kept], log_scale[kept]
        parts.mul_(norm.clamp_min(torch.finfo(norm.dtype).tiny).reciprocal()[:, None, None, None])
        power = torch.view_as_complex(parts) if power.is_complex() else parts.squeeze(-1)
        power = power @ power
    return bounds


def grams(matrices: Tensor) -> Tensor:
    """``A A*`` or ``A* A``, whichever is smaller, of matrices [..., O, I]."""
    adjoint = matrices.mH
    return matrices @ adjoint if matrices.shape[-2] <= matrices.shape[-1] else adjoint @ matrices


def gram_iteration_error(side: int, other: int, unit: float = UNIT) -> float:
    """Relative rounding error of a bound by Gram iteration, however many squarings, for matrices [side, other].

    A computed product of two matrices over ``n`` terms errs by at most ``sqrt(2) (n + 2) u`` times the product of their
    Frobenius norms (complex entries; Higham, section 3.6), which is at most ``side`` times that of the spectral norms.
    So does the Gram matrix with ``n = other``; each squaring, ``n = side``, does so once for the product and twice
    because its factor is Hermitian only up to the error before, and counts half as much as the one before it. In the
    root of what is iterated all that is at most ``side (other + 3 side + 10) u``, doubled here for terms of higher
    order and for the norms.
    """
    return 2 * side * (other + 3 * side + 16) * unit


def spectral_bound(weight: Tensor) -> float:
    """Upper bound on the largest singular value of a matrix [O, I]; at most 0.2 % above it in practice.

    Up to :data:`EIGEN_LIMIT` it is the root of the largest eigenvalue of the Gram matrix plus the solver's error, a
    modest multiple of ``u`` times the trace (LAPACK Users' Guide, section 4.7), 1e-9 above the truth or closer. Beyond,
    :func:`_certified_bound`. ``inf`` where an entry is not finite.
    """
    side, largest = min(weight.shape), _largest(weight)
    if not 0 < largest < math.inf:
        return 0.0 if largest == 0 else math.inf
    if side > CHOLESKY_LIMIT:
        return gram_bound(weight)
    # No square of a float32 leaves the range of float64.
    w, power = unit_scale(weight) if side <= EIGEN_LIMIT or weight.dtype == torch.float64 else (weight.detach(), 1.0)
    w = w if w.shape[0] == side else w.T
    if side == 1:
        return round_up(float(torch.linalg.vector_norm(w)), w.numel()) * power
    if side <= EIGEN_LIMIT:
        gram = w @ w.T
        squared: float | None = max(0.0, float(torch.linalg.eigvalsh(gram)[-1])) + gram_error(gram, sum(w.shape))
    else:
        squared = _certified_bound(w, (spectral_estimate(weight) / power) ** 2)
    return gram_bound(weight) if squared is None else math.sqrt(squared) * (1 + 4 * UNIT) * power


def gram_error(gram: Tensor, terms: int) -> float:
    """Bounds the rounding of Gram matrices [..., n, n] and of their eigenvalues, by a multiple of ``u`` times a trace.

    Args:
        gram: in float64, or what has its diagonal up to signs.
        terms: rows and columns of what it is the Gram matrix of.
    """
    return 64 * terms * UNIT * float(gram.diagonal(dim1=-2, dim2=-1).real.sum(-1).abs().amax())


def _certified_bound(w: Tensor, about: float) -> float | None:
    """Upper bound on the largest eigenvalue of ``G = W W^T``.

    If the floating-point Cholesky factorisation of ``t I - G`` runs to its end, then ``lambda_min(t I - G) >= -gamma
    trace`` with ``gamma = gamma_{n+1} / (1 - gamma_{n+1})``, hence ``lambda_max(G) <= t + gamma trace(t I - G)``:
    Rump, Verification of Positive Definiteness, BIT 2006, after Demmel (LAPACK Working Note 14) and Higham, Accuracy
    and Stability of Numerical Algorithms, theorem 10.3.

    Args:
        w: [n, m], whose squares neither over- nor underflow in float64.
        about: where to look; decides how tight the bound is, not whether it holds.

    Returns:
        None where no proposal passes.
    """
    for excess in (2e-3, 8e-3, 0.05, 0.5, 2.0):
        shifted, level = _minus_gram(w), about * (1 + excess)
        n, slack = len(shifted), gram_error(shifted, sum(w.shape))
        shifted.diagonal().add_(level)
        upper = shifted.T  # LAPACK's order of entries, in which it needs no second matrix
        place = (upper, torch.empty((), dtype=torch.int32)) if w.device.type == "cpu" else None
        if int(torch.linalg.cholesky_ex(upper, upper=True, out=place)[1]) == 0:
            return level + slack + 8 * (n + 2) * UNIT * n * level  # the trace is at most n level
    return None


def _minus_gram(w: Tensor) -> Tensor:
    """``-W W^T`` in float64, arbitrary above the diagonal blocks, where nobody reads.

    Sides whose rows would fall on the same lines of a cache get eight rows and columns of zeros, which change no bound.
    """
    n = len(w)
    side = n + 8 * (n % 128 == 0)
    gram = torch.empty(side, side, dtype=torch.float64, device=w.device)
    gram[n:] = 0
    for first in range(0, w.shape[1], _COLUMNS):  # never all of W in float64
        part = w[:, first : first + _COLUMNS].double()
        for start in range(0, n, EIGEN_LIMIT):
            stop = min(n, start + EIGEN_LIMIT)
            gram[start:stop, :stop].addmm_(part[start:stop], part[:stop].T, beta=float(first > 0), alpha=-1)
    return gram


def spectral_estimate(weight: Tensor) -> float:
    """About the largest singular value, *not* a bound: the exact one up to :data:`EIGEN_LIMIT`, else a Ritz value."""
    if min(weight.shape) <= EIGEN_LIMIT:
        return spectral_bound(weight)
    w = weight.detach() if weight.shape[0] <= weight.shape[1] else weight.detach().T
    if 2.0**-30 < _largest(weight) < 2.0**30:  # no square over- or underflows, in float32 either
        return math.sqrt(_lanczos(w))
    w, power = unit_scale(w)
    return power if power == 0 or math.isinf(power) else math.sqrt(_lanczos(w)) * power


def _lanczos(w: Tensor, steps: int = 32) -> float:
    """The largest Ritz value of ``W W^T`` after ``steps`` from a fixed vector: an eigenvalue nearly, from below."""
    n = w.shape[0]
    at = torch.arange(1, n + 1, dtype=torch.float64, device=w.device)
    basis = w.new_zeros(min(steps, n), n)
    images = w.new_zeros(len(basis), w.shape[1])
    r, first = torch.cos(at * at).to(w.dtype), 0.0  # public and without structure
    for j in range(len(basis)):
        size = float(torch.linalg.vector_norm(r))
        if size <= 16 * torch.finfo(w.dtype).eps * first:
            break
        basis[j] = r / size
        images[j] = basis[j] @ w
        r = w @ images[j]
        first = first or float(torch.linalg.vector_norm(r))
        for _ in range(2):  # twice is enough (Kahan)
            r -= (basis[: j + 1] @ r) @ basis[: j + 1]
    images = images.double()
    return float(torch.linalg.eigvalsh(images @ images.T)[-1])


def matrix_norms(weight: Tensor, spectral: float | None = None) -> OperatorNorms:
    """The five operator norms of ``x -> weight @ x``, ``weight`` [O, I].

    ``spectral`` passes in an upper bound that is already proved. Non-finite weights give ``inf`` norms.
    """
    largest, (rows, columns) = _largest(weight), weight.shape
    if largest == 0:
        return OperatorNorms.uniform(0.0)
    if not largest < math.inf:
        return OperatorNorms()
    # No square of a float32 leaves the range of float64.
    power = 2.0 ** max(-1000, min(1000, math.frexp(largest)[1])) if weight.dtype == torch.float64 else 1.0
    count = min(rows, max(1, _BLOCK // columns))  # rows that fit into a cache
    buffer = torch.empty(count, columns, dtype=torch.float64, device=weight.device)
    row_sums, row_norms = buffer.new_empty(rows), buffer.new_empty(rows)
    column_sums = buffer.new_zeros(columns)
    for start in range(0, rows, count):
        stop = min(rows, start + count)
        w = buffer[: stop - start].copy_(weight.detach()[start:stop])
        if power != 1:
            w.div_(power)
        w.abs_()
        torch.sum(w, 1, out=row_sums[start:stop])
        torch.linalg.vector_norm(w, dim=1, out=row_norms[start:stop])
        column_sums += w.sum(0)
    return OperatorNorms(
        inf_inf=round_up(float(row_sums.amax()) * power, columns),
        two_inf=round_up(float(row_norms.amax()) * power, columns),
        two_two=spectral_bound(weight) if spectral is None else spectral,
        one_one=round_up(float(column_sums.amax()) * power, rows),
        one_inf=largest,
    )
