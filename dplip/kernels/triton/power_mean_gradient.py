# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the power mean's gradients: both of a batch in one pass, per example, and their norms.

The cotangent is folded into the difference: ``dy r = u^(p-1)`` with ``u = a (x - w)`` and
``a = sign(dy) (|dy| I^(-1/p))^(1/(p-1)) / ||x - w||_p``, so powers stay in range at no extra multiplication. A thread
adds ``u^(p-1)`` to the input gradient it holds and to a sum over its examples, which is a part of the weight gradient:
at p = 8 that is 7 operations for both, where two passes would take 12. Sums have one order, so results one value.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels.triton.launch import processors
from dplip.kernels.triton.powers import (
    SMALL,
    Config,
    compiled_exponent,
    cut,
    load_tiles,
    options,
    outer,
    row_factors,
    rows_contiguous,
)
from dplip.kernels.triton.tile import halves, tile_rows

__all__ = ["BACKWARD_CONFIGS", "backward", "coefficients", "cotangents", "ghost_norm", "weight_grad"]

BACKWARD_CONFIGS = (  # rm x tm examples by rn x tn coordinates, bk neurons at once; the first was fastest on an H200
    Config(16, 2, 4, 32, 4, 2, 3),
    Config(16, 2, 8, 32, 4, 2, 1),
    Config(32, 1, 4, 32, 4, 2, 3),
    Config(32, 1, 2, 64, 4, 2, 2),
)
PARTS = 1 << 27  # numbers of the weight gradient kept before they are summed: 512 MiB


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
def cotangents(t, a, q, p, P: tl.constexpr):
    """Two factors of ``dy r`` for differences ``t`` and the coefficients of their outputs."""
    if P > 0:
        first, second = row_factors(t * a, p, P)
    else:
        share = tl.abs(t) * a
        share = tl.where(share > 1, 1.0, share)  # unlike a minimum, keeps NaN
        first, second = row_factors(tl.where(t < 0, -share, share), p, P)
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
        coefficient, w = outer(a, there)
        weight = tl.reshape(q, coefficient.shape)
        first, second = cotangents(here - w, coefficient, weight, p, P)
        if WANT_X:
            grad = tl.fma(first, second, grad)
        part = tl.expand_dims(tl.sum(first * second, 0), 3)
    else:
        there0, there1 = halves(there, N)
        a0, a1 = halves(a, N)
        q0, q1 = halves(q, N)
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
    """Both gradients in one pass: ``dx[s, b, i]`` over a span of neurons, ``dw[block of b, o, i]`` over examples."""
    rows, rows_in = tile_rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = tile_rows(tl.program_id(1), I, RN, TN)
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
    first, second = cotangents(t, coefficient, weight, p, P)
    tl.store(grad + (b * O + o) * I + i, -first * second, mask=inside)


@triton.jit
def _add_squares(total, m, n, a, p, P: tl.constexpr, N: tl.constexpr):
    """``total`` plus the squares of N coordinates' rows."""
    if N == 1:
        u, v = outer(m, n)
        first, second = cotangents(u - v, a, 1.0, p, P)
        row = first * second
        result = tl.fma(row, row, total)
    else:
        m0, m1 = halves(m, N)
        n0, n1 = halves(n, N)
        result = _add_squares(_add_squares(total, m0, n0, a, p, P, N // 2), m1, n1, a, p, P, N // 2)
    return result


@triton.jit
def _power_mean_ghost_kernel(
    x, w, a, factor, B, O, I, stride_x, stride_w, columns, p,
    P: tl.constexpr, EVEN: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``factor[b, o] = sum_i (|x - w| / ||x - w||_p)^(2 (p-1))``."""
    rows, rows_in = tile_rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = tile_rows(tl.program_id(1), O, RN, TN)
    b, o = rows.to(tl.int64)[:, None, :, None], cols[None, :, None, :]
    inside = (b < B) & (o < O)
    coefficient = tl.load(a + b * columns + o, mask=inside, other=0)
    step = tl.arange(0, BK)[:, None, None]
    x_at = x + rows_in.to(tl.int64)[None] * stride_x + step
    w_at = w + cols_in.to(tl.int64)[None] * stride_w + step
    total = tl.zeros((RM, RN, TM, TN), tl.float32)
    for k in tl.range(0, I, BK, num_stages=STAGES):
        m, n = load_tiles(x_at, w_at, k, I - step, EVEN)
        total = _add_squares(total, m, n, coefficient, p, P, BK)
    tl.store(factor + b * O + o, total, mask=inside)


def coefficients(
    y: Tensor, dy: Tensor | None, i: int, p: float, power: int, rows: int = 1
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Padded coefficients ``a`` and ``q`` (``a`` again where there is none), and what kernels need to read them."""
    y = rows_contiguous(y)
    (b, o), dy = y.shape, y if dy is None else rows_contiguous(dy)
    unit = dy is y
    rows, columns = triton.cdiv(b, rows) * rows, triton.cdiv(o, 16) * 16
    a = torch.empty(rows, columns, device=y.device, dtype=torch.float32)
    q = a if unit or power > 0 else torch.empty(rows, columns, device=y.device, dtype=torch.float32)
    _power_mean_coefficient_kernel[(triton.cdiv(a.numel(), 512),)](
        y=y, dy=dy, a=a, q=q, B=b, O=o, I=i, stride_y=y.stride(0), stride_dy=dy.stride(0), rows=rows,
        columns=columns, p=p, P=power, UNIT=unit, BLOCK=512, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return a, q, {"columns": columns, "p": p, "P": power}


def backward(
    x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float,
    want_x: bool = True, want_w: bool = True, config: Config = BACKWARD_CONFIGS[0],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """float32 gradients of ``x`` and ``w`` from the float32 values ``y``; an unwanted one is empty.

    The weight gradient is summed over blocks of ``rm x tm`` examples, in order, at most :data:`PARTS` numbers at once.
    """
    x, w = rows_contiguous(x), rows_contiguous(w)
    (b, i), o = x.shape, len(w)
    dx, dw = (
        torch.zeros(shape if want else 0, device=x.device) for want, shape in ((want_x, (b, i)), (want_w, (o, i)))
    )
    if b * o * i == 0:
        return dx, dw
    tile_m, tile_n = config.rm * config.tm, config.rn * config.tn
    a, q, shared = coefficients(y, dy, i, p, compiled_exponent(p), tile_m)
    at_once = max(1, PARTS // (o * i)) if want_w else triton.cdiv(b, tile_m)
    for first in range(0, triton.cdiv(b, tile_m), at_once):
        rows = slice(first * tile_m, (first + at_once) * tile_m)
        part = x[rows]
        grid = triton.cdiv(len(part), tile_m), triton.cdiv(i, tile_n)
        spans, span = cut(grid[0] * grid[1], o, config.bk, processors(x.device) * config.resident)
        parts_x = torch.empty(spans if want_x else 0, len(part), i, device=x.device, dtype=torch.float32)
        parts_w = torch.empty(grid[0] if want_w else 0, o, i, device=x.device, dtype=torch.float32)
        _power_mean_backward_kernel[(*grid, spans)](
            x=part, w=w, a=a[rows], q=q[rows], dx=parts_x, dw=parts_w, B=len(part), O=o, I=i, stride_x=x.stride(0),
            stride_w=w.stride(0), span=span, WANT_X=want_x, WANT_W=want_w, **shared, **options(config),
        )  # fmt: skip
        if want_x:
            dx[rows] = parts_x.sum(0) if spans > 1 else parts_x[0]
        if want_w:
            dw += parts_w.sum(0) if grid[0] > 1 else parts_w[0]
    return dx, dw


def weight_grad(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    """Each example's float32 weight gradient [B, O, I]."""
    x, w = rows_contiguous(x), rows_contiguous(w)
    (b, i), o = x.shape, len(w)
    grad = torch.empty(b, o, i, device=x.device, dtype=torch.float32)
    if grad.numel():
        a, q, shared = coefficients(y, dy, i, p, compiled_exponent(p))
        _power_mean_per_sample_kernel[(b, triton.cdiv(o, 8), triton.cdiv(i, 256))](
            x=x, w=w, a=a, q=q, grad=grad, O=o, I=i, stride_x=x.stride(0), stride_w=w.stride(0),
            **shared, BO=8, BI=256, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return grad


def ghost_norm(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float, config: Config = SMALL) -> Tensor:
    """The float32 l_2 norm [B] of each example's weight gradient, which is not formed."""
    x, w = rows_contiguous(x), rows_contiguous(w)
    (b, i), o = x.shape, len(w)
    factor = torch.empty(b, o, device=x.device, dtype=torch.float32)
    if factor.numel():
        a, _, shared = coefficients(y, None, i, p, compiled_exponent(p))
        _power_mean_ghost_kernel[(triton.cdiv(b, config.rm * config.tm), triton.cdiv(o, config.rn * config.tn))](
            x=x, w=w, a=a, factor=factor, B=b, O=o, I=i, stride_x=x.stride(0), stride_w=w.stride(0),
            EVEN=i % config.bk == 0, **shared, **options(config),
        )  # fmt: skip
    return torch.linalg.vector_norm(factor.sqrt_().mul_(dy), dim=1).mul_(i ** (-1 / p))
