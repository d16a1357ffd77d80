# SPDX-License-Identifier: Apache-2.0
r"""Linear parts of layers, and upper bounds on the norms of their rows and columns that are still alive.

For weights ``l`` of the output's and ``r`` of the input's entries, one pair per example, ``||diag(l) W diag(r)||_2`` is
bounded from above in one of three ways: the largest eigenvalue of the smaller Gram matrix plus its error, Gram
iteration on it (every iterate is an upper bound, and differentiable), or, where the matrix is too large to be formed
for every example, Schur's test ``||A||_2^2 <= max_i sum_j |A_ij| max_j sum_i |A_ij|``. The bound of the whole matrix
caps all of them. Never power iteration, which approaches the norm from below: the weak point of the method's
original code.

Examples with the same weights share one matrix, and matrices are formed a few at a time.

Sources: Huang, Zhang, Shi, Kolter, Anandkumar, Training Certifiably Robust Neural Networks with Efficient Local
Lipschitz Bounds, NeurIPS 2021, section 3; Delattre, Barthelemy, Araujo, Allauzen, ICML 2023, theorem 2.1 (Gram
iteration).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dplip.layers import LipschitzLayer, NormalizedConv2d, NormalizedLinear, ReferenceShift
from dplip.layers.affine import Affine
from dplip.layers.affine_conv2d import AffineConv2d
from dplip.layers.base import Shapes
from dplip.operator_norm import unit_scale

__all__ = ["LinearPart", "linear_part", "root", "scaled_spectral"]

ENTRIES = 2**22
"""Convolutions are written out as matrices of at most this many entries."""

COST = 2**31
"""Most multiplications for one example's Gram matrix; beyond it only Schur's test is used."""

_CHUNK = 2**23  # entries held at a time: 64 MiB in float64
_SMALL = 2.0**-60  # least positive weight: its square times that of an entry of the matrix does not underflow
_TINY = 1e-280  # covers the squares that do


def root(x: Tensor) -> Tensor:
    """``sqrt(x)`` for ``x >= 0`` with gradient 0 at 0."""
    alive = x > 0
    return torch.where(alive, torch.where(alive, x, 1.0).sqrt(), 0.0)


def scaled_spectral(matrix: Tensor, left: Tensor, right: Tensor, iterations: int | None = None) -> Tensor:
    """Upper bounds [B] on ``||diag(left_b) matrix diag(right_b)||_2``.

    Args:
        matrix: [O, I].
        left, right: [B, O] and [B, I], >= 0.
        iterations: of Gram iteration, differentiable; None for eigenvalues, whose error is added.
    """
    pairs, which = torch.unique(torch.cat([left, right], 1), dim=0, return_inverse=True)
    left, right = (_floor(side) for side in pairs.split([left.shape[1], right.shape[1]], 1))
    unit, power = (matrix, 1.0) if iterations is not None else unit_scale(matrix)
    if power == 0 or math.isinf(power):
        return left.new_full((len(which),), power)
    small = min(matrix.shape)
    step = max(1, _CHUNK // max(matrix.numel(), small * small, 1))
    common = bool((right == right[:1]).all()) if matrix.shape[0] <= matrix.shape[1] else bool((left == left[:1]).all())
    shared = _inner(unit, left[:1], right[:1]) if common and len(left) else None
    bounds = []
    for k in range(0, len(left), step):
        rows = slice(k, k + step)
        gram = _inner(unit, left[rows], right[rows]) if shared is None else shared
        outer = left[rows] if matrix.shape[0] <= matrix.shape[1] else right[rows]
        gram = outer.unsqueeze(2) * gram * outer.unsqueeze(1)
        bounds.append(_eigenvalue(gram, sum(matrix.shape)) if iterations is None else _iterated(gram, iterations))
    squares = torch.cat(bounds) if bounds else left.new_zeros(0)
    dead = (left == 0).all(1) | (right == 0).all(1)
    return torch.where(dead, 0.0, root(squares) * ((1 + 2.0**-50) * power))[which]


def _floor(weight: Tensor) -> Tensor:
    return torch.where(weight > 0, weight.clamp_min(_SMALL), 0.0)


def _inner(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``W R^2 W^T`` where that is the smaller side, else ``W^T L^2 W``: [B, n, n]."""
    if matrix.shape[0] <= matrix.shape[1]:
        return (matrix * right.square().unsqueeze(1)) @ matrix.T
    return (matrix.T * left.square().unsqueeze(1)) @ matrix


def _eigenvalue(gram: Tensor, terms: int) -> Tensor:
    """The largest eigenvalue, raised by the errors of forming the matrices and of their eigenvalues.

    Both are small multiples of ``u`` times the trace (LAPACK Users' Guide, section 4.7).
    """
    slack = 64 * terms * (torch.finfo(gram.dtype).eps / 2) * gram.diagonal(dim1=1, dim2=2).sum(1)
    return torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0) + slack + _TINY


def _iterated(gram: Tensor, iterations: int) -> Tensor:
    """``||G^(2^t)||_F^(1 / 2^t) >= lambda_max(G)`` for positive semidefinite ``G``, rescaled on the way."""
    log = gram.new_zeros(len(gram))
    for t in range(iterations + 1):
        norm = root(gram.square().sum((1, 2))).clamp_min(torch.finfo(gram.dtype).tiny ** 0.5)
        log = log + norm.log() / 2**t
        if t < iterations:
            gram = gram / norm[:, None, None]
            gram = gram @ gram
    return log.exp()


class LinearPart:
    """``x -> W x`` of one affine layer, dense or convolutional.

    Args:
        layer: holds the weight.
        size: of one example's input.
        iterations: see :func:`scaled_spectral`; with it everything is differentiable in the weight.
    """

    def __init__(self, layer: Affine | AffineConv2d, size: tuple[int, ...], iterations: int | None = None) -> None:
        self.layer, self.size, self.iterations = layer, size, iterations
        self.weight = layer.weight if iterations is not None else layer.weight.detach()
        self.matrix = self._matrix()
        self.whole = math.inf if iterations is not None else layer.operator_norms(Shapes(size, ())).two_two

    def _matrix(self) -> Tensor | None:
        if self.weight.ndim == 2:
            matrix = self.weight
        else:
            entries = math.prod(self.size)
            out = self._apply(self.weight, self.weight.new_zeros(1, *self.size))[0].numel()
            if entries * out > ENTRIES:
                return None
            eye = torch.eye(entries, dtype=self.weight.dtype, device=self.weight.device)
            matrix = self._apply(self.weight, eye.view(entries, *self.size)).flatten(1).T
        return matrix if min(matrix.shape) * matrix.numel() <= COST else None

    @property
    def _terms(self) -> int:
        return math.prod(self.weight.shape[1:])

    def _apply(self, weight: Tensor, x: Tensor) -> Tensor:
        return self.layer._convolve(x, weight, None) if isinstance(self.layer, AffineConv2d) else F.linear(x, weight)

    def absolute(self, x: Tensor) -> Tensor:
        """``|W| x`` for ``x >= 0`` [B, *size], rounded up. Where ``x`` is infinite, so is every output."""
        known = torch.isfinite(x)
        spread = self._apply(self.weight.abs(), torch.where(known, x, 0.0)) * self._up(self._terms)
        return torch.where(known.flatten(1).all(1).view(-1, *[1] * (spread.ndim - 1)), spread, math.inf)

    def rows(self, right: Tensor) -> Tensor:
        """l_2 norms of the rows of ``W diag(right)``, rounded up: one per output entry, for every example."""
        if self.iterations is not None:
            return root(self._apply(self.weight.square(), right.square()))
        unit, power = unit_scale(self.weight)
        if power == 0 or math.isinf(power):
            return self._apply(torch.zeros_like(unit), right) + power
        squares = self._apply(unit.square(), _floor(right).square())
        some = self._apply((unit != 0).to(unit), (right > 0).to(unit)) > 0
        return torch.where(some, (squares * self._up(self._terms) + _TINY).sqrt(), 0.0) * (power * (1 + 2.0**-50))

    def norm(self, left: Tensor, right: Tensor) -> Tensor:
        """Upper bounds [B] on ``||diag(left) W diag(right)||_2``."""
        flat = left.flatten(1), right.flatten(1)
        if self.matrix is not None:
            bound = scaled_spectral(self.matrix, flat[0], flat[1], self.iterations)
        else:
            rows = (left * self.absolute(right)).flatten(1).amax(1)
            columns = (right * self._columns(left)).flatten(1).amax(1)
            bound = root(rows) * root(columns) * self._up(2)
        if self.whole == math.inf:
            return bound
        largest = flat[0].amax(1) * flat[1].amax(1)
        return torch.minimum(bound, largest * (self.whole * (1 + 2.0**-50)))

    def _columns(self, left: Tensor) -> Tensor:
        """``|W|^T left``, rounded up."""
        weight = self.weight.abs()
        if not isinstance(self.layer, AffineConv2d):
            return left @ weight * self._up(len(weight))
        w = self.layer.window
        columns = torch.nn.grad.conv2d_input(
            (len(left), *self.size), weight, left, w.stride, w.padding, w.dilation, self.layer.groups
        )
        return columns * self._up(weight.numel())

    def _up(self, terms: int) -> float:
        return 1 + 4 * (terms + 4) * torch.finfo(self.weight.dtype).eps / 2


def linear_part(
    layer: LipschitzLayer | None, size: tuple[int, ...], iterations: int | None = None
) -> LinearPart | None:
    """The linear part of an affine layer, or None for any other (subclasses may compute something else)."""
    inner = layer.layer if isinstance(layer, ReferenceShift) and type(layer) is ReferenceShift else layer
    if isinstance(inner, (Affine, AffineConv2d)) and type(inner) in (
        Affine,
        AffineConv2d,
        NormalizedConv2d,
        NormalizedLinear,
    ):
        return LinearPart(inner, size, iterations)
    return None
