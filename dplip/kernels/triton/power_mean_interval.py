# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the power mean's range over a box: both ends in one pass, and their gradients in another.

The lower end may be 0 next to an upper end of any size, so powers are always taken relative to each end's largest
difference, found in a first loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels.triton.launch import processors
from dplip.kernels.triton.power_mean_gradient import coefficients, cotangents
from dplip.kernels.triton.powers import (
    SMALL,
    Config,
    add_power,
    compiled_exponent,
    cut,
    options,
    outer,
    root,
    rows_contiguous,
)
from dplip.kernels.triton.tile import halves, tile_rows

__all__ = ["BACKWARD_CONFIGS", "CONFIGS", "backward", "forward"]

CONFIGS = (SMALL, Config(4, 4, 16, 8, 4, 2, 3))  # estimated, the first is used
BACKWARD_CONFIGS = (Config(8, 2, 4, 32, 2, 2, 3), Config(8, 2, 8, 32, 2, 2, 1), Config(8, 1, 4, 32, 4, 2, 3))
PARTS = 1 << 27  # numbers of the weight gradient kept before they are summed: 512 MiB


@triton.jit
def _ends(l, u, v):
    """Smallest and largest ``|x - v|`` of ``l <= x <= u``; NaN stays."""
    below, above = l - v, u - v
    near = tl.maximum(tl.maximum(below, -above, propagate_nan=tl.PropagateNan.ALL), 0.0, tl.PropagateNan.ALL)
    return near, tl.maximum(tl.abs(below), tl.abs(above), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tops(low, high, l, u, v, N: tl.constexpr):
    """``low`` and ``high`` against N coordinates' ends."""
    if N == 1:
        a, b = outer(l, v)
        near, far = _ends(a, tl.reshape(u, a.shape), b)
        low, high = tl.maximum(low, near), tl.maximum(high, far)
    else:
        l0, l1 = halves(l, N)
        u0, u1 = halves(u, N)
        v0, v1 = halves(v, N)
        low, high = _tops(low, high, l0, u0, v0, N // 2)
        low, high = _tops(low, high, l1, u1, v1, N // 2)
    return low, high


@triton.jit
def _add_ends(low, high, l, u, v, lift_low, by_low, lift_high, by_high, p, P: tl.constexpr, N: tl.constexpr):
    """``low`` and ``high`` plus the powers of N coordinates' ends, relative to their largest."""
    if N == 1:
        a, b = outer(l, v)
        near, far = _ends(a, tl.reshape(u, a.shape), b)
        low = add_power(low, near * lift_low * by_low, p, P)
        high = add_power(high, far * lift_high * by_high, p, P)
    else:
        l0, l1 = halves(l, N)
        u0, u1 = halves(u, N)
        v0, v1 = halves(v, N)
        low, high = _add_ends(low, high, l0, u0, v0, lift_low, by_low, lift_high, by_high, p, P, N // 2)
        low, high = _add_ends(low, high, l1, u1, v1, lift_low, by_low, lift_high, by_high, p, P, N // 2)
    return low, high


@triton.jit
def _relative(top):
    """A power of two and a factor that bring ``top`` to 1 one after the other, without overflow; 0 for 0."""
    lift = tl.where(top < 5.4e-20, 18446744073709551616.0, 1.0)
    return lift, tl.where(top > 0, 1 / (top * lift), 0.0)


@triton.jit
def _power_mean_interval_forward_kernel(
    lower, upper, w, low, high, B, O, I, stride_lower, stride_upper, stride_w, p,
    P: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    rows, rows_in = tile_rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = tile_rows(tl.program_id(1), O, RN, TN)
    step = tl.arange(0, BK)[:, None, None]
    lower_at = lower + rows_in.to(tl.int64)[None] * stride_lower + step
    upper_at = upper + rows_in.to(tl.int64)[None] * stride_upper + step
    w_at = w + cols_in.to(tl.int64)[None] * stride_w + step
    top_low = tl.zeros((RM, RN, TM, TN), tl.float32)
    top_high = tl.zeros((RM, RN, TM, TN), tl.float32)
    for k in tl.range(0, I, BK, num_stages=STAGES):
        l = tl.load(lower_at + k, mask=step < I - k, other=0).to(tl.float32)
        u = tl.load(upper_at + k, mask=step < I - k, other=0).to(tl.float32)
        v = tl.load(w_at + k, mask=step < I - k, other=0).to(tl.float32)
        top_low, top_high = _tops(top_low, top_high, l, u, v, BK)
    lift_low, by_low = _relative(top_low)
    lift_high, by_high = _relative(top_high)
    sum_low = tl.zeros((RM, RN, TM, TN), tl.float32)
    sum_high = tl.zeros((RM, RN, TM, TN), tl.float32)
    for k in tl.range(0, I, BK, num_stages=STAGES):
        l = tl.load(lower_at + k, mask=step < I - k, other=0).to(tl.float32)
        u = tl.load(upper_at + k, mask=step < I - k, other=0).to(tl.float32)
        v = tl.load(w_at + k, mask=step < I - k, other=0).to(tl.float32)
        sum_low, sum_high = _add_ends(sum_low, sum_high, l, u, v, lift_low, by_low, lift_high, by_high, p, P, BK)
    at = rows.to(tl.int64)[:, None, :, None] * O + cols[None, :, None, :]
    inside = (rows < B)[:, None, :, None] & (cols < O)[None, :, None, :]
    # Where the largest is 0 the root of 0 is not asked for; NaN reaches the sums even then.
    some_low, some_high = (top_low > 0) | (sum_low != sum_low), (top_high > 0) | (sum_high != sum_high)
    tl.store(low + at, tl.where(some_low, top_low * root(sum_low / I, p, P), 0.0), mask=inside)
    tl.store(high + at, tl.where(some_high, top_high * root(sum_high / I, p, P), 0.0), mask=inside)


@triton.jit
def _add_gradients(grad_l, grad_u, l, u, there, a0, q0, a1, q1, p, P: tl.constexpr, N: tl.constexpr):
    """Both ends' gradients plus what N neurons add, and the sums [RN, TM, TN, N], bit-reversed, over examples."""
    if N == 1:
        low_a, v = outer(a0, there)
        below, above = l - v, u - v
        near_upper = above < -tl.maximum(below, 0.0)
        first, second = cotangents(
            tl.where(near_upper, above, tl.maximum(below, 0.0)), low_a, tl.reshape(q0, low_a.shape), p, P
        )
        near = first * second
        far_upper = tl.abs(above) > tl.abs(below)
        first, second = cotangents(
            tl.where(far_upper, above, below), tl.reshape(a1, low_a.shape), tl.reshape(q1, low_a.shape), p, P
        )
        far = first * second
        grad_l += tl.where(near_upper, 0.0, near) + tl.where(far_upper, 0.0, far)
        grad_u += tl.where(near_upper, near, 0.0) + tl.where(far_upper, far, 0.0)
        part = tl.expand_dims(tl.sum(near + far, 0), 3)
    else:
        there0, there1 = halves(there, N)
        a00, a01 = halves(a0, N)
        q00, q01 = halves(q0, N)
        a10, a11 = halves(a1, N)
        q10, q11 = halves(q1, N)
        grad_l, grad_u, part0 = _add_gradients(grad_l, grad_u, l, u, there0, a00, q00, a10, q10, p, P, N // 2)
        grad_l, grad_u, part1 = _add_gradients(grad_l, grad_u, l, u, there1, a01, q01, a11, q11, p, P, N // 2)
        part = tl.reshape(tl.join(part0, part1), (part0.shape[0], part0.shape[1], part0.shape[2], N))
    return grad_l, grad_u, part


@triton.jit
def _power_mean_interval_backward_kernel(
    lower, upper, w, a0, q0, a1, q1, dlower, dupper, dw, B, O, I, stride_lower, stride_upper, stride_w, columns, p,
    span, P: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``dlower``, ``dupper`` [s, b, i] over a span of neurons and ``dw`` [block of b, o, i] over examples."""
    rows, rows_in = tile_rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = tile_rows(tl.program_id(1), I, RN, TN)
    b, i = rows.to(tl.int64)[:, None, :, None], cols[None, :, None, :]
    b_in, i_in = rows_in.to(tl.int64)[:, None, :, None], cols_in[None, :, None, :]
    # Said to Triton so that it lays threads out over the last two axes here too; nothing is vectorised on its account.
    lower_at = tl.multiple_of(tl.max_contiguous(lower + b_in * stride_lower + i_in, (1, 1, 2, TN)), (4, 4, 4, 4))
    upper_at = tl.multiple_of(tl.max_contiguous(upper + b_in * stride_upper + i_in, (1, 1, 2, TN)), (4, 4, 4, 4))
    l, u = tl.load(lower_at).to(tl.float32), tl.load(upper_at).to(tl.float32)
    grad_l = tl.zeros((RM, RN, TM, TN), tl.float32)
    grad_u = tl.zeros((RM, RN, TM, TN), tl.float32)
    step = tl.arange(0, BK)[:, None, None]
    reversed_step = tl.arange(0, BK)
    if BK == 4:
        reversed_step = (reversed_step & 1) * 2 + reversed_step // 2
    start = tl.program_id(2) * span
    for k in tl.range(start, tl.minimum(start + span, O), BK, num_stages=STAGES):
        neuron = k + step
        there = tl.load(w + tl.minimum(neuron, O - 1).to(tl.int64) * stride_w + cols_in[None]).to(tl.float32)
        at = rows.to(tl.int64)[None] * columns + neuron
        low_a, high_a = tl.load(a0 + at), tl.load(a1 + at)
        low_q, high_q = low_a, high_a
        if P <= 0:
            low_q, high_q = tl.load(q0 + at), tl.load(q1 + at)
        grad_l, grad_u, part = _add_gradients(grad_l, grad_u, l, u, there, low_a, low_q, high_a, high_q, p, P, BK)
        o = k + reversed_step[None, None, :]
        to = (tl.program_id(0).to(tl.int64) * O + o) * I + cols[:, :, None]
        tl.store(dw + to, -tl.sum(part, 1), mask=(o < O) & (cols < I)[:, :, None])
    to = (tl.program_id(2).to(tl.int64) * B + b) * I + i
    tl.store(dlower + to, grad_l, mask=(b < B) & (i < I))
    tl.store(dupper + to, grad_u, mask=(b < B) & (i < I))


def forward(lower: Tensor, upper: Tensor, w: Tensor, p: float, config: Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """``lower``, ``upper`` [B, I], ``w`` [O, I] of at most 32 bits -> float32 ``low``, ``high`` [B, O]."""
    lower, upper, w = (rows_contiguous(v) for v in (lower, upper, w))
    (b, i), o = lower.shape, len(w)
    low, high = (torch.empty(b, o, device=w.device, dtype=torch.float32) for _ in range(2))
    if low.numel():
        grid = triton.cdiv(b, config.rm * config.tm), triton.cdiv(o, config.rn * config.tn)
        _power_mean_interval_forward_kernel[grid](
            lower=lower, upper=upper, w=w, low=low, high=high, B=b, O=o, I=i, stride_lower=lower.stride(0),
            stride_upper=upper.stride(0), stride_w=w.stride(0), p=p, P=compiled_exponent(p), **options(config),
        )  # fmt: skip
    return low, high


def backward(
    lower: Tensor, upper: Tensor, w: Tensor, low: Tensor, high: Tensor, dlow: Tensor, dhigh: Tensor, p: float,
    need_lower: bool = True, need_upper: bool = True, need_w: bool = True, config: Config = BACKWARD_CONFIGS[0],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """float32 gradients of ``lower``, ``upper`` and ``w``; all are computed, what is not needed comes back empty."""
    lower, upper, w = (rows_contiguous(v) for v in (lower, upper, w))
    (b, i), o = lower.shape, len(w)
    dlower, dupper, dw = (torch.zeros(v.shape, device=w.device) for v in (lower, upper, w))
    if b * o * i:
        tile_m, tile_n = config.rm * config.tm, config.rn * config.tn
        a0, q0, shared = coefficients(low, dlow, i, p, compiled_exponent(p), tile_m)
        a1, q1, _ = coefficients(high, dhigh, i, p, compiled_exponent(p), tile_m)
        at_once = max(1, PARTS // (o * i))
        for first in range(0, triton.cdiv(b, tile_m), at_once):
            rows = slice(first * tile_m, (first + at_once) * tile_m)
            size = len(lower[rows])
            grid = triton.cdiv(size, tile_m), triton.cdiv(i, tile_n)
            spans, span = cut(grid[0] * grid[1], o, config.bk, processors(w.device) * config.resident)
            shapes = (spans, size, i), (spans, size, i), (grid[0], o, i)
            parts = [torch.empty(shape, device=w.device, dtype=torch.float32) for shape in shapes]
            _power_mean_interval_backward_kernel[(*grid, spans)](
                lower=lower[rows], upper=upper[rows], w=w, a0=a0[rows], q0=q0[rows], a1=a1[rows], q1=q1[rows],
                dlower=parts[0], dupper=parts[1], dw=parts[2], B=size, O=o, I=i, stride_lower=lower.stride(0),
                stride_upper=upper.stride(0), stride_w=w.stride(0), span=span, **shared, **options(config),
            )  # fmt: skip
            dlower[rows], dupper[rows] = parts[0].sum(0), parts[1].sum(0)
            dw += parts[2].sum(0)
    needs = (dlower, need_lower), (dupper, need_upper), (dw, need_w)
    dlower, dupper, dw = (g if need else g.new_empty(0) for g, need in needs)
    return dlower, dupper, dw
