# SPDX-License-Identifier: Apache-2.0
"""Rigorous upper bounds on the operator norms of a concrete matrix, in float64.

Row and column norms are exact up to rounding. The spectral norm is an exact float64 SVD up to
:data:`SVD_LIMIT` and Gram iteration beyond. Power iteration is never used: it approaches the norm from below,
so whatever rests on it (a certificate, a noise scale) is wrong by the unknown gap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.norms import OperatorNorms

__all__ = ["SVD_LIMIT", "UNIT", "gram_bound", "matrix_norms", "round_up", "spectral_bound", "unit_scale"]

SVD_LIMIT = 4096
UNIT = 2.0**-53
"""Unit roundoff of float64."""


def round_up(value: float, terms: int) -> float:
    """``value`` raised by the rounding error of a float64 computation with ``terms`` operations."""
    return value * (1 + 4 * (terms + 4) * UNIT)


def unit_scale(weight: Tensor) -> tuple[Tensor, float]:
    """``weight`` in float64 divided by a power of two, and that power: squares of tiny entries do not underflow.

    The power is 0 for a zero matrix and ``inf`` where an entry is not finite.
    """
    w = weight.detach().to(torch.float64)
    largest = float(w.abs().amax()) if w.numel() else 0.0
    if math.isnan(largest) or math.isinf(largest):
        return w, math.inf
    if largest == 0:
        return w, 0.0
    power = 2.0 ** max(-1000, min(1000, math.frexp(largest)[1]))
    return w / power, power


def gram_bound(weight: Tensor, iterations: int = 10) -> float:
    """Upper bound on the largest singular value by Gram iteration.

    ``G_0 = W W^T``, ``G_{t+1} = G_t^2`` with the scale kept in log space; ``sigma <= ||G_t||_F^(1/2^(t+1))`` holds at
    *every* ``t`` and tightens to equality (relative excess at most ``rank^(1/2^(t+2)) - 1``).

    Source: Delattre, Barthelemy, Araujo, Allauzen, Efficient Bound of Lipschitz Constant for Convolutional
    Layers by Gram Iteration, ICML 2023, theorem 2.1.
    """
    w, power = unit_scale(weight)
    if power == 0 or math.isinf(power):
        return power
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    log_scale = 0.0
    for t in range(iterations + 1):
        norm = float(torch.linalg.matrix_norm(gram))
        if not math.isfinite(norm):
            return math.inf
        if norm == 0:
            return 0.0
        log_scale = log_scale + math.log(norm)
        if t == iterations:
            break
        gram = gram / norm
        gram = gram @ gram
        log_scale *= 2
    # Each product of n x n matrices with Frobenius norm <= 1 errs by at most n u; the 2^t-th root divides it again.
    slack = 1 + 8 * (max(w.shape) + iterations + 8) * math.sqrt(min(w.shape)) * UNIT * (iterations + 1)
    return math.exp(log_scale / 2 ** (iterations + 1)) * slack * power


def spectral_bound(weight: Tensor) -> float:
    """Upper bound on the largest singular value of a matrix [O, I].

    A float64 SVD errs by a modest multiple of ``max(O, I) u sigma`` (LAPACK Users' Guide, section 4.9), which is
    added. ``inf`` where an entry is not finite.
    """
    if weight.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(weight).all()):
        return math.inf
    if max(weight.shape) > SVD_LIMIT:
        return gram_bound(weight)
    sigma = float(torch.linalg.svdvals(weight.detach().to(torch.float64))[0])
    return sigma * (1 + 16 * sum(weight.shape) * UNIT)


def matrix_norms(weight: Tensor, spectral: float | None = None) -> OperatorNorms:
    """The five operator norms of ``x -> weight @ x``, ``weight`` [O, I].

    ``spectral`` passes in an upper bound that is already proved. Non-finite weights give ``inf`` norms.
    """
    unit, power = unit_scale(weight)
    w, (rows, columns) = weight.detach().to(torch.float64).abs(), weight.shape
    if power == 0:
        return OperatorNorms.uniform(0.0)
    if math.isinf(power):
        return OperatorNorms()
    return OperatorNorms(
        inf_inf=round_up(float(w.sum(1).amax()), columns),
        two_inf=round_up(float(torch.linalg.vector_norm(unit, dim=1).amax()) * power, columns),
        two_two=spectral_bound(weight) if spectral is None else spectral,
        one_one=round_up(float(w.sum(0).amax()), rows),
        one_inf=float(w.amax()),
    )
