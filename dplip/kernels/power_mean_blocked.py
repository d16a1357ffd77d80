# SPDX-License-Identifier: Apache-2.0
"""The power mean on a CPU: tiles that stay in a core's cache, multiplication or exp2 and log2 in place of pow.

Values of whole exponents are summed as they come, scaled by one power of two so that nothing overflows. Underflow, and
the floor that keeps a CPU from its slow path, change a term by at most 4 times the smallest normal number; where a sum
is at least ``I / eps`` of that it is one rounding, and examples with a smaller sum are computed anew relative to each
output's maximum, which is safe at every p.

Gradients fold the cotangent into the difference, as the Triton kernels do: ``dy r = u^(p-1)`` with ``u = a (x - w)``
and ``a = sign(dy) (|dy| I^(-1/p))^(1/(p-1)) / ||x - w||_p``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.kernels.dispatch import register
from dplip.kernels.distance import tiles, wide
from dplip.kernels.powers import whole_power

__all__ = ["power_mean_blocked", "relative_mean"]

CPU = frozenset({"cpu"})
_OFTEN_TINY = 16  # from this exponent on, powers of ordinary differences fall below the normal numbers


def _whole(p: float) -> int:
    """``p`` where repeated multiplication beats exp2 and log2, else 0."""
    n = int(p) if p == int(p) else 0
    return n if n <= 64 or (n <= 1024 and n & (n - 1) == 0) else 0


def _floor(t: Tensor) -> float:
    """A power that stays a normal number when it is computed with rounding."""
    return 4 * torch.finfo(t.dtype).tiny


def _raise(t: Tensor, p: float) -> Tensor:
    """``t^p`` for ``0 <= t <= 1``, in place; at least a normal number, as a CPU is slow below."""
    if _whole(p):
        return whole_power(t.clamp_min_(_floor(t) ** (1 / p)), _whole(p))
    return t.log2_().mul_(p).clamp_min_(math.log2(_floor(t))).exp2_()


def _root_of_sum(t: Tensor, n: int) -> Tensor:
    """``sum |t|^n`` over the last axis, of which the square root; ``t`` is overwritten."""
    if n == 2:
        return torch.linalg.vector_norm(t, dim=-1)
    if n % 2 == 1:
        return whole_power(t.abs_(), n).sum(-1).sqrt_()
    if n % 4 == 0 and n > _OFTEN_TINY:
        t.square_().clamp_min_(_floor(t) ** (2 / n))
        return torch.linalg.vector_norm(whole_power(t, n // 4), dim=-1)
    return torch.linalg.vector_norm(whole_power(t, n // 2), dim=-1)


def _root(root: Tensor, n: int) -> Tensor:
    """``root^(2/n)``, its exponent taken apart first: the rounding of ``2/n`` is multiplied by the logarithm."""
    mantissa, exponent = torch.frexp(root)
    whole = torch.div(2 * exponent, n, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(mantissa.square_(), 2 * exponent - n * whole).pow_(1 / n), whole)


@register("power_mean", "blocked", CPU)
def power_mean_blocked(x: Tensor, w: Tensor, p: float) -> Tensor:
    """Values [B, O]."""
    x, w = x.to(wide(x.dtype)), w.to(wide(w.dtype))
    y = x.new_empty(len(x), len(w))
    if y.numel() == 0:
        return y
    scale = _scale(x, w, p)
    if scale is None:
        return _relative(x, w, p, y)
    n, d, info = _whole(p), x.shape[1], torch.finfo(x.dtype)
    for rows, t in tiles(x * scale, w * scale):  # the square roots of the sums
        y[rows] = _root_of_sum(t, n)
    good = ((y >= math.sqrt(d * _floor(y) / info.eps)) & (y < math.inf)).all(1)
    y = _root(y.mul_(d**-0.5), n).div_(scale)
    if not bool(good.all()):
        y[~good] = _relative(x[~good], w, p, y.new_empty(int((~good).sum()), len(w)))
    return y


def _scale(x: Tensor, w: Tensor, p: float) -> float | None:
    """A power of two under which no sum overflows and most are precise; None where there is no such."""
    info = torch.finfo(x.dtype)
    largest = float(x.abs().amax() + w.abs().amax())
    if not _whole(p) or not 0 < largest < math.inf:
        return None
    top, bottom, terms = math.log2(info.max) - 2, math.log2(_floor(x) / info.eps), math.log2(x.shape[1])
    if top - bottom - 2 * terms < 3 * p:  # distances below an eighth of the largest would be out of range
        return None
    exponent = math.floor((top - terms) / p - math.log2(largest))
    return 2.0**exponent if abs(exponent) < -math.log2(info.tiny) - 2 else None


def relative_mean(magnitude: Tensor, p: float) -> Tensor:
    """``(mean |t|^p)^(1/p)`` over the last axis for non-negative input, which is overwritten."""
    largest = magnitude.amax(-1, keepdim=True)
    ratio = magnitude.div_(torch.where(largest == 0, 1, largest))
    return largest.squeeze(-1) * _raise(ratio, p).mean(-1).pow_(1 / p)


def _relative(x: Tensor, w: Tensor, p: float, y: Tensor) -> Tensor:
    for rows, t in tiles(x, w):
        y[rows] = relative_mean(t.abs_(), p)
    return y


def _coefficients(y: Tensor, dy: Tensor | None, d: int, p: float) -> tuple[Tensor, Tensor | None]:
    """``a`` of the module's docstring and None; or, without ``dy`` or for no whole ``p``, ``1 / ||t||`` and ``q``."""
    norm = y.double() * d ** (1 / p)
    if dy is None or not _whole(p):
        a, q = norm.reciprocal(), None if dy is None else (dy * d ** (-1 / p)).unsqueeze(-1)
    else:
        a, q = (dy.double().abs() * d ** (-1 / p)).pow_(1 / (p - 1)).div_(norm).copysign_(dy), None
    a.clamp_(-torch.finfo(y.dtype).max, torch.finfo(y.dtype).max).masked_fill_(y < torch.finfo(y.dtype).tiny, 0)
    return a.to(y.dtype).unsqueeze(-1), q


def _cotangents(t: Tensor, a: Tensor, q: Tensor | None, p: float) -> Tensor:
    """``dy r`` for differences ``t``, which are overwritten. Whole and even ``p`` needs no sign: its power is odd."""
    n = _whole(p)
    if n and n % 2 == 0:
        t.mul_(a)
        if n > _OFTEN_TINY:
            t = torch.hardshrink(t, _floor(t) ** (1 / (n - 1)))
        return whole_power(t, n - 1)
    sign = t.mul_(a).sign()
    size = t.abs_()
    if n:
        whole_power(size, n - 1)
    else:
        _raise(size.clamp_max_(1), p - 1)
    size.mul_(sign)
    return size if q is None else size.mul_(q)


@register("power_mean_backward", "blocked", CPU)
def _backward(
    x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float, want_x: bool, want_w: bool
) -> tuple[Tensor, Tensor]:
    x, w = x.to(wide(x.dtype)), w.to(wide(w.dtype))
    dx, dw = x.new_zeros(x.shape if want_x else 0), w.new_zeros(w.shape if want_w else 0)
    for rows, t in tiles(x, w):
        a, q = _coefficients(y[rows], dy[rows], x.shape[1], p)
        s = _cotangents(t, a, q, p)
        if want_x:
            torch.sum(s, 1, out=dx[rows])
        if want_w:
            dw -= s.sum(0) if len(s) > 1 else s[0]
    return dx, dw


@register("power_mean_weight_grad", "blocked", CPU)
def _weight_grad(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    x, w = x.to(wide(x.dtype)), w.to(wide(w.dtype))
    grad = x.new_empty(len(x), *w.shape)
    for rows, t in tiles(x, w):
        torch.neg(_cotangents(t, *_coefficients(y[rows], dy[rows], x.shape[1], p), p), out=grad[rows])
    return grad


@register("power_mean_ghost_norm", "blocked", CPU)
def _ghost_norm(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    x, w = x.to(wide(x.dtype)), w.to(wide(w.dtype))
    norm = torch.empty_like(y)
    for rows, t in tiles(x, w):
        s = _cotangents(t, *_coefficients(y[rows], None, x.shape[1], p), p)
        torch.linalg.vector_norm(s, dim=-1, out=norm[rows])
    return torch.linalg.vector_norm(norm.mul_(dy), dim=1).mul_(x.shape[1] ** (-1 / p))
