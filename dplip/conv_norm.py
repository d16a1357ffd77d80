# SPDX-License-Identifier: Apache-2.0
r"""Rigorous upper bounds on the operator norms of a zero-padded, strided, dilated, grouped convolution, in float64.

A convolution of stride ``s`` is one of stride 1 on the ``s^2`` phases of its padded input, which are a permutation of
it (:func:`phases`). There, with kernel ``K_u`` and symbol ``K(theta) = sum_u K_u exp(i <u, theta>)``:

* Along an axis of known length the convolution is a compression of the circular one of any period that covers the
  padded input, so its spectral norm is at most ``max sigma(K(theta))`` over that period's frequencies. (A period as
  long as the unpadded image is *not* enough: windows would see the image's other end in place of zeros.)
* For any length the norm is at most ``sup sigma(K(theta))`` over the whole circle. For unit vectors ``a, b``, the
  real part of ``a* K(theta) b``, centred, is a trigonometric polynomial of degree ``n = (U - 1) / 2`` in ``theta``
  for ``U`` taps, so at distance ``delta <= pi / (2n)`` from a maximum ``M`` it is at least ``M cos(n delta)`` (M.
  Riesz, 1914; Borwein and Erdelyi, Polynomials and Polynomial Inequalities, 1995, section 5.1). Frequencies of period
  ``N`` leave ``delta <= pi / N``: their maximum over ``cos(n pi / N)`` bounds the supremum, axis by axis.
* Each ``y = K P x`` with windows ``P``, of which at most ``v`` contain an entry: ``sigma <= sqrt(v) sigma([K_u]_u)``.

Singular values over a period's frequencies: :mod:`dplip.conv_symbol`. Groups act on disjoint channels, so a norm is the
*largest* of theirs. The bound of :mod:`dplip.aol` is taken where it is smaller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.aol import aol_bound
from dplip.conv_symbol import symbol_bound
from dplip.norms import OperatorNorms
from dplip.operator_norm import UNIT, round_up, spectral_bound, unit_scale

__all__ = ["conv_norms", "conv_spectral_bound", "phases"]

_FREE = 16  # period per degree of freedom where the length is unknown: cos(pi / 32)^-1 = 1.005 an axis

Pair = tuple[int, int]


def phases(weight: Tensor, stride: Pair, dilation: Pair, groups: int) -> Tensor:
    """The stride-1 kernel [groups, O / groups, I / groups, sh, sw, U, V] on the phases of the input.

    ``phases[g, o, i, a, b, u, v]`` is the entry of ``weight`` [O, I / groups, kh, kw] at tap ``(t, t')`` with ``t dh
    = u sh + a``, ``t' dw = v sw + b``, and 0 where there is no such tap.
    """
    o, i, kh, kw = weight.shape
    reach = [(k - 1) * d + 1 for k, d in zip((kh, kw), dilation, strict=True)]
    u, v = (math.ceil(r / s) for r, s in zip(reach, stride, strict=True))
    dense = weight.new_zeros(o, i, u * stride[0], v * stride[1])
    dense[:, :, : reach[0] : dilation[0], : reach[1] : dilation[1]] = weight
    split = dense.view(groups, o // groups, i, u, stride[0], v, stride[1])
    return split.permute(0, 1, 2, 4, 6, 3, 5)


def conv_norms(
    weight: Tensor,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    size: Pair | None = None,
    overlap: int | None = None,
) -> OperatorNorms:
    """The five operator norms of ``x -> conv2d(x, weight)``, ``weight`` [O, I / groups, kh, kw].

    Rows of the Jacobian are rows of the weight, shortened at the border; columns are sums over one phase.

    Args:
        weight: non-finite entries give ``inf`` norms.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        size: (H, W) of the image; None bounds images of all sizes.
        overlap: the most windows that contain one entry, if known; at most the default, ``U V`` of :func:`phases`.
    """
    unit, power = unit_scale(weight)
    if power == 0:
        return OperatorNorms.uniform(0.0)
    if math.isinf(power):
        return OperatorNorms()
    w = weight.detach().double().abs().flatten(1)
    columns = phases(weight.detach().double().abs(), stride, dilation, groups).sum((1, 5, 6))
    bound = conv_spectral_bound(
        weight, stride=stride, padding=padding, dilation=dilation, groups=groups, size=size, overlap=overlap
    )
    return OperatorNorms(
        inf_inf=round_up(float(w.sum(1).amax()), w.shape[1]),
        two_inf=round_up(float(torch.linalg.vector_norm(unit.flatten(1), dim=1).amax()) * power, w.shape[1]),
        two_two=bound,
        one_one=round_up(float(columns.amax()), w.numel()),
        one_inf=float(w.amax()),
    )


def conv_spectral_bound(
    weight: Tensor,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    size: Pair | None = None,
    overlap: int | None = None,
) -> float:
    """Upper bound on the largest singular value; arguments as in :func:`conv_norms`.

    ``inf`` where an entry is not finite.
    """
    unit, power = unit_scale(weight)
    if power == 0 or math.isinf(power):
        return power
    kernel = phases(unit, stride, dilation, groups).flatten(2, 4)  # [groups, O, I, U, V]
    taps = kernel.shape[3], kernel.shape[4]
    period, loss = [1, 1], 1.0
    for axis, u in enumerate(taps):
        free = max(1, _FREE * (u - 1))
        known = free if size is None else max(u, math.ceil((size[axis] + 2 * padding[axis]) / stride[axis]))
        period[axis] = min(free, known)
        if known > free or size is None:
            loss *= math.cos((u - 1) / 2 * math.pi / free)
    symbol = symbol_bound(kernel, (period[0], period[1])) / loss * (1 + 16 * UNIT)
    flat = kernel.permute(0, 1, 3, 4, 2).flatten(2)
    windows = math.sqrt(math.prod(taps) if overlap is None else min(overlap, math.prod(taps))) * (1 + 4 * UNIT)
    return min(symbol, windows * max(spectral_bound(group) for group in flat), aol_bound(kernel)) * power
