# SPDX-License-Identifier: Apache-2.0
r"""Almost-orthogonal rescaling: columns made 1-Lipschitz together by one factor each.

For any matrix ``W``, ``D = diag(sum_j |W^T W|_ij)^(-1/2)`` gives ``||W D||_2 <= 1`` (Prach, Lampert,
Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks, ECCV 2022, theorem 1), and columns that are
orthogonal already keep their direction and become unit vectors. With ``D`` left out, ``||W||_2^2 <= max_i sum_j |W^T
W|_ij`` is a cheap bound. For a convolution ``W^T W`` is the autocorrelation of the kernel (theorem 2), whatever the
image's size: zero padding only takes rows and columns of the infinite matrix away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dplip.operator_norm import round_up, unit_scale

__all__ = ["aol_bound", "aol_factors"]


def _correlations(kernel: Tensor) -> tuple[Tensor, float]:
    """``sum_j |W^T W|_ij`` [G, I] for the kernel divided by a power of two, and that power."""
    unit, power = unit_scale(kernel)
    if power == 0 or math.isinf(power):
        return unit.new_zeros(kernel.shape[0], kernel.shape[2]), power
    pad = (kernel.shape[3] - 1, kernel.shape[4] - 1)
    columns = unit.transpose(1, 2)  # [G, I, O, U, V]
    return torch.stack([F.conv2d(c, c, padding=pad).abs().sum((1, 2, 3)) for c in columns]), power


def aol_factors(kernel: Tensor) -> Tensor:
    """The diagonal of ``D`` [G, I] in float64, 1 for columns of zeros.

    Args:
        kernel: of stride 1, [G, O, I, U, V], see :func:`dplip.conv_norm.phases`; a matrix has ``G = U = V = 1``. A
            column is an entry of ``I`` in its group.
    """
    sums, power = _correlations(kernel)
    return torch.where(sums > 0, 1 / (sums.sqrt() * power).clamp_min(1e-300), 1.0)


def aol_bound(kernel: Tensor) -> float:
    """``max_i (sum_j |W^T W|_ij)^(1/2)``, an upper bound on the spectral norm; ``inf`` where an entry is not finite."""
    sums, power = _correlations(kernel)
    if power == 0 or math.isinf(power):
        return power
    return round_up(math.sqrt(float(sums.amax())) * power, kernel.numel())
