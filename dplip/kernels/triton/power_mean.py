# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the power-mean distance, its gradients, per-example gradients and ghost norm.

A thread holds a tile of ``RM x RN`` outputs: tensors are shaped ``[.., RM, RN, TM, TN]`` with ``TM * TN`` threads, so
Triton's default layout puts the register tile on the leading axes and each loaded value is used ``RM`` or ``RN`` times.

Range. Powers are summed as they come, of ``s t`` with a power of two ``s`` per tile taken from a sample of its
differences (1 up to p = 8). A term that underflows is off by at most 2^-126, hence a sum ``S`` of I terms by at most
``I 2^-126``; where ``S >= I 2^-102`` that is a relative 2^-24, and ``1/p`` of it after the root. Every other sum, and
every one that overflowed, is redone by the finishing kernel with each output's differences divided by their maximum,
which is safe at every p. Exponents above 100 or not whole always take that way.

Gradients fold the cotangent into the difference: ``dy r = u^(p-1)`` with ``u = a (x - w)`` and
``a = sign(dy) (|dy| I^(-1/p))^(1/(p-1)) / ||x - w||_p``, so powers stay in range at no extra multiplication.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels.dispatch import interpreted

__all__ = ["BACKWARD_CONFIGS", "CONFIGS", "backward", "forward", "ghost_norm", "weight_grad"]


class Config(NamedTuple):
    """A launch: register tile, thread tile, steps of the loop at once, pipeline stages, programs on one processor."""

    rm: int
    rn: int
    tm: int
    tn: int
    bk: int
    stages: int
    resident: int

    @property
    def warps(self) -> int:
        return self.tm * self.tn // 32


CONFIGS = (  # forward: rm x tm examples by rn x tn neurons; estimated from the offline compilation, to be timed
    Config(8, 8, 16, 8, 4, 3, 3),
    Config(8, 8, 16, 8, 8, 3, 3),
    Config(8, 8, 16, 16, 4, 3, 1),
    Config(4, 8, 16, 8, 8, 3, 4),
)
BACKWARD_CONFIGS = (  # rm x tm examples by rn x tn coordinates, bk neurons at once
    Config(16, 2, 4, 32, 4, 2, 3),
    Config(16, 2, 8, 32, 4, 2, 1),
    Config(32, 1, 4, 32, 4, 2, 3),
    Config(32, 1, 2, 64, 4, 2, 2),
)
FINISH = Config(2, 4, 16, 8, 8, 2, 4)  # small: most often there is nothing to do anew
INTERPRETED = tl.constexpr(interpreted())  # inline assembly is not interpreted
WHOLE = 100  # exponents above take the maximum first: s t to that power leaves the range too easily
UNSCALED = 8  # exponents up to here need no scale: distances in [4e-4, 1e4] are in range as they are
PARTS = 1 << 27  # numbers of the weight gradient kept before they are summed: 512 MiB


@triton.jit
def _power(t, P: tl.constexpr):
    """``t^P`` by squaring."""
    result = t
    if P > 1:
        half = _power(t, P // 2)
        result = half * half
        if P % 2 == 1:
            result = result * t
    return result


@triton.jit
def _log2(a, P: tl.constexpr):
    """Base-2 logarithm: the chip's for ``P`` = 0, off by at most 2^-22 below 2; the slow exact one for ``P`` = -1."""
    if P < 0 or INTERPRETED:
        result = tl.log2(a)
    else:
        result = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [a], tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def _add_power(total, t, p, P: tl.constexpr):
    """``total + |t|^p``; ``P`` as :func:`_exponent` gives it."""
    if P <= 0:
        result = total + tl.exp2(p * _log2(tl.abs(t), P))
    elif P % 2 == 0:
        half = _power(t, P // 2)
        result = tl.fma(half, half, total)
    else:
        result = tl.fma(_power(t, P - 1), tl.abs(t), total)
    return result


@triton.jit
def _row_factors(u, p, P: tl.constexpr):
    """Two factors of ``sign(u) |u|^(p-1)``, for their product to be fused with a sum."""
    if P <= 0:  # the logarithm is lowered by its error, so no row exceeds its bound on its account
        log = _log2(tl.abs(u), P) - (2.4e-7 if P == 0 else 0.0)
        first, second = tl.where(u < 0, -1.0, 1.0), tl.exp2((p - 1) * log)
    elif P == 2:
        first, second = u, tl.full(u.shape, 1.0, tl.float32)
    elif P % 2 == 1:  # the odd power carries the sign
        first, second = _power(u, P - 2), tl.abs(u)
    elif P > 4 and P % 3 == 1:  # u^(p-1) = (u^3)^((p-1)/3): two products less at p = 64
        second = u * u * u
        first = _power(second, (P - 1) // 3 - 1)
    else:
        first, second = _power(u, P - 2), u
    return first, second


@triton.jit
def _halves(v, N: tl.constexpr):
    """``v`` [N, R, T] as two of N / 2: ways of naming registers, which cost nothing."""
    R: tl.constexpr = v.shape[1]
    T: tl.constexpr = v.shape[2]
    return tl.split(tl.permute(tl.reshape(v, (2, N // 2, R, T)), (1, 2, 3, 0)))


@triton.jit
def _rows(pid, n, R: tl.constexpr, T: tl.constexpr):
    """Indices [R, T] of a tile, and the same kept inside ``n``."""
    rows = pid * (R * T) + tl.arange(0, R)[:, None] * T + tl.arange(0, T)[None, :]
    return rows, tl.minimum(rows, n - 1)


@triton.jit
def _tiles(x_at, w_at, k, end, EVEN: tl.constexpr):
    """``x`` [BK, RM, TM] and ``w`` [BK, RN, TN] at coordinates ``k`` [BK, 1, 1]; 0 from ``end`` on."""
    if EVEN:
        a, b = tl.load(x_at + k), tl.load(w_at + k)
    else:
        a, b = tl.load(x_at + k, mask=k < end, other=0), tl.load(w_at + k, mask=k < end, other=0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _outer(a, b):
    """``a`` [1, RM, TM] and ``b`` [1, RN, TN] shaped to meet in [RM, RN, TM, TN]."""
    RM: tl.constexpr = a.shape[1]
    TM: tl.constexpr = a.shape[2]
    RN: tl.constexpr = b.shape[1]
    TN: tl.constexpr = b.shape[2]
    return tl.reshape(a, (RM, 1, TM, 1)), tl.reshape(b, (1, RN, 1, TN))


@triton.jit
def _largest(top, a, b, N: tl.constexpr):
    """``top`` against ``|a - b|`` for N coordinates."""
    if N == 1:
        m, n = _outer(a, b)
        result = tl.maximum(top, tl.abs(m - n))
    else:
        a0, a1 = _halves(a, N)
        b0, b1 = _halves(b, N)
        result = _largest(_largest(top, a0, b0, N // 2), a1, b1, N // 2)
    return result


@triton.jit
def _add_powers(total, a, b, scale, lift, p, P: tl.constexpr, FORM: tl.constexpr, N: tl.constexpr):
    """``total`` plus N coordinates' ``|t|^p``: ``t = a - b`` (FORM 0), ``scale a + b`` (1), ``(a - b) lift scale`` (2)."""
    if N == 1:
        m, n = _outer(a, b)
        if FORM == 0:
            t = m - n
        elif FORM == 1:
            t = tl.fma(m, scale, n)
        else:
            t = (m - n) * lift * scale
        result = _add_power(total, t, p, P)
    else:
        a0, a1 = _halves(a, N)
        b0, b1 = _halves(b, N)
        result = _add_powers(total, a0, b0, scale, lift, p, P, FORM, N // 2)
        result = _add_powers(result, a1, b1, scale, lift, p, P, FORM, N // 2)
    return result


@triton.jit
def _power_of_two(m):
    """The power of two that brings ``m`` into [1, 2), kept inside [2^-100, 2^100]; 1 for zero and what is not finite."""
    exponent = (m.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    scale = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where((m > 0) & (m < float("inf")), scale, 1.0)


@triton.jit
def _power_mean_forward_kernel(
    x, w, sums, scales, B, O, I, stride_x, stride_w, span,
    P: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``sums[s, b, o] = sum_i (scale (x - w))^P`` over the s-th span of coordinates; ``scales`` [tiles of b, of o]."""
    rows, rows_in = _rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = _rows(tl.program_id(1), O, RN, TN)
    step = tl.arange(0, BK)[:, None, None]
    x_at = x + rows_in.to(tl.int64)[None] * stride_x + step
    w_at = w + cols_in.to(tl.int64)[None] * stride_w + step
    scale = 1.0
    if SCALED:
        top = tl.zeros((RM, RN, TM, TN), tl.float32)
        for j in range(8):  # the same sample in every span, so the spans of a tile have one scale
            k = (j * I // 8) // BK * BK
            a, b = _tiles(x_at, w_at, k, I - step, False)
            top = _largest(top, a, b, BK)
        scale = _power_of_two(tl.max(tl.reshape(top, (RM * RN * TM * TN,)), 0))
        if tl.program_id(2) == 0:
            tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)
    total = tl.zeros((RM, RN, TM, TN), tl.float32)
    start = tl.program_id(2) * span
    end = tl.minimum(start + span, I)
    for k in tl.range(start, end, BK, num_stages=STAGES):
        a, b = _tiles(x_at, w_at, k, end - step, EVEN)
        if SCALED:
            total = _add_powers(total, a, -scale * b, scale, scale, 0.0, P, 1, BK)
        else:
            total = _add_powers(total, a, b, scale, scale, 0.0, P, 0, BK)
    at = (tl.program_id(2).to(tl.int64) * B + rows.to(tl.int64)[:, None, :, None]) * O + cols[None, :, None, :]
    tl.store(sums + at, total, mask=(rows < B)[:, None, :, None] & (cols < O)[None, :, None, :])


@triton.jit
def _root(mean, p, P: tl.constexpr):
    """``mean^(1/p)``, square roots where they do; float64 elsewhere, as p-th roots of float32 lose digits to the log."""
    if P == 2 or P == 4 or P == 8 or P == 16 or P == 32 or P == 64:
        result = tl.sqrt_rn(mean)
        if P > 2:
            result = _root(result, p, P // 2)
    else:
        result = tl.exp2(tl.log2(mean.to(tl.float64)) / p).to(tl.float32)
    return result


@triton.jit
def _power_mean_finish_kernel(
    x, w, sums, scales, y, B, O, I, stride_x, stride_w, p, spans,
    P: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``y`` from the sums; anew, relative to the maximum, where they left the range or ``WHOLE`` says there are none."""
    rows, rows_in = _rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = _rows(tl.program_id(1), O, RN, TN)
    b, o = rows.to(tl.int64)[:, None, :, None], cols[None, :, None, :]
    inside = (b < B) & (o < O)
    value = tl.zeros((RM, RN, TM, TN), tl.float32)
    good = value > 0
    if not WHOLE:
        for s in range(spans):
            value += tl.load(sums + (b + s * tl.cast(B, tl.int64)) * O + o, mask=inside, other=1)
        good = (value < float("inf")) & (value >= I * 1.9721522630525295e-31)  # 2^-102
        value = _root(value / I, p, P)
        if SCALED:
            value /= tl.load(scales + (b // TILE_M) * tl.cdiv(O, TILE_N) + o // TILE_N, mask=inside, other=1)
    if tl.max(tl.reshape((inside & (good == 0)).to(tl.int32), (RM * RN * TM * TN,)), 0) > 0:
        step = tl.arange(0, BK)[:, None, None]
        x_at = x + rows_in.to(tl.int64)[None] * stride_x + step
        w_at = w + cols_in.to(tl.int64)[None] * stride_w + step
        top = tl.zeros((RM, RN, TM, TN), tl.float32)
        for k in tl.range(0, I, BK, num_stages=STAGES):
            m, n = _tiles(x_at, w_at, k, I - step, EVEN)
            top = _largest(top, m, n, BK)
        lift = tl.where(top < 5.4e-20, 18446744073709551616.0, 1.0)  # 2^64: the inverse of a subnormal overflows
        inverse = tl.where(top > 0, 1 / (top * lift), 0.0)
        mean = tl.zeros((RM, RN, TM, TN), tl.float32)
        for k in tl.range(0, I, BK, num_stages=STAGES):
            m, n = _tiles(x_at, w_at, k, I - step, EVEN)
            mean = _add_powers(mean, m, n, inverse, lift, p, P, 2, BK)
        redone = top * _root(mean / I, p, P)
        # Where the maximum is 0 the root of 0 is not asked for; NaN differences reach the mean even then.
        value = tl.where(good, value, tl.where((top > 0) | (mean != mean), redone, 0.0))
    tl.store(y + b * O + o, value, mask=inside)


@triton.jit
def _power_mean_coefficient_kernel(
    y, dy, a, q, B, O, I, stride_y, stride_dy, rows, columns, p,
    P: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What multiplies differences in the backward kernels, [rows, columns]: zero outside B x O and where ``y`` is 0.

    ``P`` > 0: ``a`` of the module's docstring; ``UNIT`` or ``P`` <= 0: ``a = 1 / ||x - w||_p``, ``q = dy I^(-1/p)``.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, o = at // columns, at % columns
    inside = (b < B) & (o < O)
    value = tl.load(y + b * stride_y + o, mask=inside, other=0)
    mean = tl.log2(tl.cast(I, tl.float64)) / p  # log2 of I^(1/p)
    norm = tl.log2(value.to(tl.float64)) + mean
    if UNIT:
        result = tl.exp2(-norm).to(tl.float32)
    else:
        g = tl.load(dy + b * stride_dy + o, mask=inside, other=0).to(tl.float32)
        if P <= 0:
            result = tl.exp2(-norm).to(tl.float32)
            tl.store(q + at, g * tl.exp2(-mean).to(tl.float32), mask=b < rows)
        else:
            root = (tl.log2(tl.abs(g).to(tl.float64)) - mean) / (tl.cast(p, tl.float64) - 1) - norm
            size = tl.minimum(tl.exp2(root), 3.4e38).to(tl.float32)
            size = tl.where(root == root, size, float("nan"))
            result = tl.where(g < 0, -size, size)
    tl.store(a + at, tl.where((value < 1.1754943508222875e-38) | (inside == 0), 0.0, result), mask=b < rows)


@triton.jit
def _cotangents(t, a, q, p, P: tl.constexpr):
    """Two factors of ``dy r`` for differences ``t`` and the coefficients of their outputs."""
    if P > 0:
        first, second = _row_factors(t * a, p, P)
    else:
        share = tl.abs(t) * a
        share = tl.where(share > 1, 1.0, share)  # unlike a minimum, keeps NaN
        first, second = _row_factors(tl.where(t < 0, -share, share), p, P)
        first *= q
    return first, second


@triton.jit
def _add_gradients(
    grad, here, there, a, q, p, P: tl.constexpr, WANT_X: tl.constexpr, WANT_W: tl.constexpr, N: tl.constexpr
):
    """``grad`` plus what N neurons add, and the sums [RN, TM, TN, N] over a thread's examples for these neurons.

    The last axis is filled in bit-reversed order.
    """
    if N == 1:
        coefficient, w = _outer(a, there)
        weight = tl.reshape(q, coefficient.shape)
        first, second = _cotangents(here - w, coefficient, weight, p, P)
        if WANT_X:
            grad = tl.fma(first, second, grad)
        part = tl.expand_dims(tl.sum(first * second, 0), 3)
    else:
        there0, there1 = _halves(there, N)
        a0, a1 = _halves(a, N)
        q0, q1 = _halves(q, N)
        grad, part0 = _add_gradients(grad, here, there0, a0, q0, p, P, WANT_X, WANT_W, N // 2)
        grad, part1 = _add_gradients(grad, here, there1, a1, q1, p, P, WANT_X, WANT_W, N // 2)
        part = tl.reshape(tl.join(part0, part1), (part0.shape[0], part0.shape[1], part0.shape[2], N))
    return grad, part


@triton.jit
def _power_mean_backward_kernel(
    x, w, a, q, dx, dw, B, O, I, stride_x, stride_w, columns, p, span,
    P: tl.constexpr, WANT_X: tl.constexpr, WANT_W: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both gradients in one pass: ``dx[s, b, i]`` over a span of neurons, ``dw[block of b, o, i]`` over its examples."""
    rows, rows_in = _rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = _rows(tl.program_id(1), I, RN, TN)
    b, i = rows.to(tl.int64)[:, None, :, None], cols[None, :, None, :]
    here_at = x + rows_in.to(tl.int64)[:, None, :, None] * stride_x + cols_in[None, :, None, :]
    # Said to Triton so that it lays threads out over the last two axes here too; nothing is vectorised on its account.
    here_at = tl.multiple_of(tl.max_contiguous(here_at, (1, 1, 2, TN)), (4, 4, 4, 4))
    here = tl.load(here_at).to(tl.float32)
    grad = tl.zeros((RM, RN, TM, TN), tl.float32)
    step = tl.arange(0, BK)[:, None, None]
    reversed_step = tl.arange(0, BK)
    if BK == 4:
        reversed_step = (reversed_step & 1) * 2 + reversed_step // 2
    elif BK == 8:
        reversed_step = (reversed_step & 1) * 4 + (reversed_step & 2) + reversed_step // 4
    start = tl.program_id(2) * span
    for k in tl.range(start, tl.minimum(start + span, O), BK, num_stages=STAGES):
        neuron = k + step
        there = tl.load(w + tl.minimum(neuron, O - 1).to(tl.int64) * stride_w + cols_in[None]).to(tl.float32)
        coefficient = tl.load(a + rows.to(tl.int64)[None] * columns + neuron)
        weight = coefficient
        if P <= 0:
            weight = tl.load(q + rows.to(tl.int64)[None] * columns + neuron)
        grad, part = _add_gradients(grad, here, there, coefficient, weight, p, P, WANT_X, WANT_W, BK)
        if WANT_W:
            o = k + reversed_step[None, None, :]
            at = (tl.program_id(0).to(tl.int64) * O + o) * I + cols[:, :, None]
            tl.store(dw + at, -tl.sum(part, 1), mask=(o < O) & (cols < I)[:, :, None])
    if WANT_X:
        tl.store(dx + (tl.program_id(2).to(tl.int64) * B + b) * I + i, grad, mask=(b < B) & (i < I))


@triton.jit
def _power_mean_per_sample_kernel(
    x, w, a, q, grad, O, I, stride_x, stride_w, columns, p,
    P: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """``-dy r`` [B, O, I], one example and a tile of its neurons and coordinates in a program."""
    b = tl.program_id(0).to(tl.int64)
    o, i = tl.program_id(1) * BO + tl.arange(0, BO)[:, None], tl.program_id(2) * BI + tl.arange(0, BI)[None, :]
    inside = (o < O) & (i < I)
    t = tl.load(x + b * stride_x + i, mask=i < I, other=0).to(tl.float32)
    t = t - tl.load(w + o.to(tl.int64) * stride_w + i, mask=inside, other=0).to(tl.float32)
    coefficient = tl.load(a + b * columns + o, mask=o < O, other=0)
    weight = coefficient
    if P <= 0:
        weight = tl.load(q + b * columns + o, mask=o < O, other=0)
    first, second = _cotangents(t, coefficient, weight, p, P)
    tl.store(grad + (b * O + o) * I + i, -first * second, mask=inside)


@triton.jit
def _add_squares(total, m, n, a, p, P: tl.constexpr, N: tl.constexpr):
    """``total`` plus the squares of N coordinates' rows."""
    if N == 1:
        u, v = _outer(m, n)
        first, second = _cotangents(u - v, a, 1.0, p, P)
        row = first * second
        result = tl.fma(row, row, total)
    else:
        m0, m1 = _halves(m, N)
        n0, n1 = _halves(n, N)
        result = _add_squares(_add_squares(total, m0, n0, a, p, P, N // 2), m1, n1, a, p, P, N // 2)
    return result


@triton.jit
def _power_mean_ghost_kernel(
    x, w, a, factor, B, O, I, stride_x, stride_w, columns, p,
    P: tl.constexpr, EVEN: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``factor[b, o] = sum_i (|x - w| / ||x - w||_p)^(2 (p-1))``."""
    rows, rows_in = _rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = _rows(tl.program_id(1), O, RN, TN)
    b, o = rows.to(tl.int64)[:, None, :, None], cols[None, :, None, :]
    inside = (b < B) & (o < O)
    coefficient = tl.load(a + b * columns + o, mask=inside, other=0)
    step = tl.arange(0, BK)[:, None, None]
    x_at = x + rows_in.to(tl.int64)[None] * stride_x + step
    w_at = w + cols_in.to(tl.int64)[None] * stride_w + step
    total = tl.zeros((RM, RN, TM, TN), tl.float32)
    for k in tl.range(0, I, BK, num_stages=STAGES):
        m, n = _tiles(x_at, w_at, k, I - step, EVEN)
        total = _add_squares(total, m, n, coefficient, p, P, BK)
    tl.store(factor + b * O + o, total, mask=inside)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _spans(tiles: int, length: int, unit: int, slots: int) -> tuple[int, int]:
    """How many spans to cut a loop of ``length`` into, and how long, to fill whole waves of ``slots`` programs."""
    units, best = triton.cdiv(length, unit), (0.0, 1)
    for spans in range(1, max(1, min(16, units // 8)) + 1):
        waves = triton.cdiv(tiles * spans, slots)
        used = tiles * units / (waves * slots * (triton.cdiv(units, spans) + 2))  # 2: what starting and ending costs
        if used > 1.02 * best[0]:
            best = used, spans
    span = triton.cdiv(units, best[1]) * unit
    return triton.cdiv(length, span), span


def _inner(t: Tensor) -> Tensor:
    """``t`` itself if its rows are contiguous.

    Raises:
        TypeError: ``t`` is float64, which these kernels would round.
    """
    if t.dtype == torch.float64:
        raise TypeError("power_mean: expected at most float32 for the Triton kernels, got float64; use the reference")
    return t if t.stride(-1) == 1 else t.contiguous()


def _exponent(p: float) -> int:
    """``p`` where multiplication wins, compiled for it: whole up to 64, powers of two up to 1024.

    Else 0, for exp2 and log2; -1 above 1024, where the chip's log2 is too coarse.
    """
    whole = int(p) if p == int(p) else 0
    if 0 < whole <= 64 or (whole <= 1024 and whole & (whole - 1) == 0):
        return whole
    return 0 if p <= 1024 else -1


def _tile(config: Config) -> dict[str, Any]:
    return {
        "RM": config.rm, "RN": config.rn, "TM": config.tm, "TN": config.tn, "BK": config.bk,
        "STAGES": config.stages, "num_warps": config.warps,
    }  # fmt: skip


def forward(x: Tensor, w: Tensor, p: float, config: Config = CONFIGS[0]) -> Tensor:
    """``x`` [B, I], ``w`` [O, I] of a dtype of at most 32 bits -> float32 [B, O]."""
    x, w = _inner(x), _inner(w)
    (b, i), o = x.shape, len(w)
    y = torch.empty(b, o, device=x.device, dtype=torch.float32)
    if y.numel() == 0:
        return y
    power = _exponent(p)
    whole, scaled = not 0 < power <= WHOLE, power > UNSCALED
    tile_m, tile_n = config.rm * config.tm, config.rn * config.tn
    grid, spans, sums, scales = (triton.cdiv(b, tile_m), triton.cdiv(o, tile_n)), 0, y, y
    operands = {"x": x, "w": w, "B": b, "O": o, "I": i, "stride_x": x.stride(0), "stride_w": w.stride(0), "P": power}
    if not whole:
        slots = _processors(x.device) * config.resident
        spans, span = _spans(grid[0] * grid[1], i, config.bk, slots)
        sums = torch.empty(spans, b, o, device=x.device, dtype=torch.float32)
        scales = torch.empty(grid, device=x.device, dtype=torch.float32)
        _power_mean_forward_kernel[(*grid, spans)](
            **operands, sums=sums, scales=scales, span=span, SCALED=scaled, EVEN=i % config.bk == 0, **_tile(config)
        )
    _power_mean_finish_kernel[(triton.cdiv(b, FINISH.rm * FINISH.tm), triton.cdiv(o, FINISH.rn * FINISH.tn))](
        **operands, sums=sums, scales=scales, y=y, p=p, spans=spans, WHOLE=whole, SCALED=scaled,
        EVEN=i % FINISH.bk == 0, TILE_M=tile_m, TILE_N=tile_n, **_tile(FINISH),
    )  # fmt: skip
    return y


def _coefficients(
    y: Tensor, dy: Tensor | None, i: int, p: float, power: int, rows: int = 1
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Padded coefficients ``a`` and ``q`` (``a`` again where there is none), and what kernels need to read them."""
    y = _inner(y)
    (b, o), dy = y.shape, y if dy is None else _inner(dy)
    unit = dy is y
    rows, columns = triton.cdiv(b, rows) * rows, triton.cdiv(o, 16) * 16
    a = torch.empty(rows, columns, device=y.device, dtype=torch.float32)
    q = a if unit or power > 0 else torch.empty(rows, columns, device=y.device, dtype=torch.float32)
    _power_mean_coefficient_kernel[(triton.cdiv(a.numel(), 512),)](
        y=y, dy=dy, a=a, q=q, B=b, O=o, I=i, stride_y=y.stride(0), stride_dy=dy.stride(0), rows=rows,
        columns=columns, p=p, P=power, UNIT=unit, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return a, q, {"columns": columns, "p": p, "P": power}


def backward(
    x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float,
    want_x: bool = True, want_w: bool = True, config: Config = BACKWARD_CONFIGS[0],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """float32 gradients of ``x`` and ``w`` from the float32 values ``y``; an unwanted one is empty.

    The weight gradient is summed over blocks of ``rm x tm`` examples, in order, at most :data:`PARTS` numbers at once.
    """
    x, w = _inner(x), _inner(w)
    (b, i), o = x.shape, len(w)
    dx, dw = (torch.zeros(shape if want else 0, device=x.device) for want, shape in ((want_x, (b, i)), (want_w, (o, i))))
    if b * o * i == 0:
        return dx, dw
    tile_m, tile_n = config.rm * config.tm, config.rn * config.tn
    a, q, coefficients = _coefficients(y, dy, i, p, _exponent(p), tile_m)
    at_once = max(1, PARTS // (o * i)) if want_w else triton.cdiv(b, tile_m)
    for first in range(0, triton.cdiv(b, tile_m), at_once):
        rows = slice(first * tile_m, (first + at_once) * tile_m)
        part = x[rows]
        grid = triton.cdiv(len(part), tile_m), triton.cdiv(i, tile_n)
        spans, span = _spans(grid[0] * grid[1], o, config.bk, _processors(x.device) * config.resident)
        parts_x = torch.empty(spans if want_x else 0, len(part), i, device=x.device, dtype=torch.float32)
        parts_w = torch.empty(grid[0] if want_w else 0, o, i, device=x.device, dtype=torch.float32)
        _power_mean_backward_kernel[(*grid, spans)](
            x=part, w=w, a=a[rows], q=q[rows], dx=parts_x, dw=parts_w, B=len(part), O=o, I=i, stride_x=x.stride(0),
            stride_w=w.stride(0), span=span, WANT_X=want_x, WANT_W=want_w, **coefficients, **_tile(config),
        )  # fmt: skip
        if want_x:
            dx[rows] = parts_x.sum(0) if spans > 1 else parts_x[0]
        if want_w:
            dw += parts_w.sum(0) if grid[0] > 1 else parts_w[0]
    return dx, dw


def weight_grad(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    """Each example's float32 weight gradient [B, O, I]."""
    x, w = _inner(x), _inner(w)
    (b, i), o = x.shape, len(w)
    grad = torch.empty(b, o, i, device=x.device, dtype=torch.float32)
    if grad.numel():
        a, q, coefficients = _coefficients(y, dy, i, p, _exponent(p))
        _power_mean_per_sample_kernel[(b, triton.cdiv(o, 8), triton.cdiv(i, 256))](
            x=x, w=w, a=a, q=q, grad=grad, O=o, I=i, stride_x=x.stride(0), stride_w=w.stride(0),
            **coefficients, BO=8, BI=256, num_warps=4,
        )  # fmt: skip
    return grad


def ghost_norm(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float, config: Config = FINISH) -> Tensor:
    """The float32 l_2 norm [B] of each example's weight gradient, which is not formed."""
    x, w = _inner(x), _inner(w)
    (b, i), o = x.shape, len(w)
    factor = torch.empty(b, o, device=x.device, dtype=torch.float32)
    if factor.numel():
        a, _, coefficients = _coefficients(y, None, i, p, _exponent(p))
        _power_mean_ghost_kernel[(triton.cdiv(b, config.rm * config.tm), triton.cdiv(o, config.rn * config.tn))](
            x=x, w=w, a=a, factor=factor, B=b, O=o, I=i, stride_x=x.stride(0), stride_w=w.stride(0),
            EVEN=i % config.bk == 0, **coefficients, **_tile(config),
        )  # fmt: skip
    return torch.linalg.vector_norm(factor.sqrt_().mul_(dy), dim=1).mul_(i ** (-1 / p))
