# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the power-mean distance.

Range. Powers are summed as they come, of ``s t`` with a power of two ``s`` per tile taken from a sample of its
differences (1 up to p = 8). A term that underflows is off by at most 2^-126, hence a sum ``S`` of I terms by at most
``I 2^-126``; where ``S >= I 2^-102`` that is a relative 2^-24, and ``1/p`` of it after the root. Every other sum, and
every one that overflowed, is redone by the finishing kernel with each output's differences divided by their maximum,
which is safe at every p. Exponents above 100 or not whole always take that way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels.triton.launch import processors
from dplip.kernels.triton.powers import (
    SMALL,
    Config,
    add_power,
    compiled_exponent,
    cut,
    load_tiles,
    options,
    outer,
    root,
    rows_contiguous,
)
from dplip.kernels.triton.tile import halves, tile_rows

__all__ = ["CONFIGS", "forward"]

CONFIGS = (  # rm x tm examples by rn x tn neurons; on an H200 the first was fastest at p = 8 and p = 64
    Config(4, 8, 16, 8, 8, 3, 4),
    Config(8, 8, 16, 16, 4, 3, 1),
    Config(8, 8, 16, 8, 8, 3, 3),
    Config(8, 8, 16, 8, 4, 3, 3),
)
FINISH = SMALL  # most often there is nothing to do anew
WHOLE = 100  # exponents above take the maximum first: s t to that power leaves the range too easily
UNSCALED = 8  # exponents up to here need no scale: distances in [4e-4, 1e4] are in range as they are


@triton.jit
def _largest(top, a, b, N: tl.constexpr):
    """``top`` against ``|a - b|`` for N coordinates."""
    if N == 1:
        m, n = outer(a, b)
        result = tl.maximum(top, tl.abs(m - n))
    else:
        a0, a1 = halves(a, N)
        b0, b1 = halves(b, N)
        result = _largest(_largest(top, a0, b0, N // 2), a1, b1, N // 2)
    return result


@triton.jit
def _add_powers(total, a, b, scale, lift, p, P: tl.constexpr, FORM: tl.constexpr, N: tl.constexpr):
    """``total`` plus N ``|t|^p``: ``t`` is ``a - b`` (FORM 0), ``scale a + b`` (1) or ``(a - b) lift scale`` (2)."""
    if N == 1:
        m, n = outer(a, b)
        if FORM == 0:
            t = m - n
        elif FORM == 1:
            t = tl.fma(m, scale, n)
        else:
            t = (m - n) * lift * scale
        result = add_power(total, t, p, P)
    else:
        a0, a1 = halves(a, N)
        b0, b1 = halves(b, N)
        result = _add_powers(total, a0, b0, scale, lift, p, P, FORM, N // 2)
        result = _add_powers(result, a1, b1, scale, lift, p, P, FORM, N // 2)
    return result


@triton.jit
def _power_of_two(m):
    """The power of two, within 2^-100 and 2^100, that brings ``m`` into [1, 2); 1 for zero and what is not finite."""
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
    rows, rows_in = tile_rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = tile_rows(tl.program_id(1), O, RN, TN)
    step = tl.arange(0, BK)[:, None, None]
    x_at = x + rows_in.to(tl.int64)[None] * stride_x + step
    w_at = w + cols_in.to(tl.int64)[None] * stride_w + step
    scale = 1.0
    if SCALED:
        top = tl.zeros((RM, RN, TM, TN), tl.float32)
        for j in range(8):  # the same sample in every span, so the spans of a tile have one scale
            k = (j * I // 8) // BK * BK
            a, b = load_tiles(x_at, w_at, k, I - step, False)
            top = _largest(top, a, b, BK)
        scale = _power_of_two(tl.max(tl.reshape(top, (RM * RN * TM * TN,)), 0))
        if tl.program_id(2) == 0:
            tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)
    total = tl.zeros((RM, RN, TM, TN), tl.float32)
    start = tl.program_id(2) * span
    end = tl.minimum(start + span, I)
    for k in tl.range(start, end, BK, num_stages=STAGES):
        a, b = load_tiles(x_at, w_at, k, end - step, EVEN)
        if SCALED:
            total = _add_powers(total, a, -scale * b, scale, scale, 0.0, P, 1, BK)
        else:
            total = _add_powers(total, a, b, scale, scale, 0.0, P, 0, BK)
    at = (tl.program_id(2).to(tl.int64) * B + rows.to(tl.int64)[:, None, :, None]) * O + cols[None, :, None, :]
    tl.store(sums + at, total, mask=(rows < B)[:, None, :, None] & (cols < O)[None, :, None, :])


@triton.jit
def _power_mean_finish_kernel(
    x, w, sums, scales, y, B, O, I, stride_x, stride_w, p, spans,
    P: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``y`` from the sums; anew, relative to the maximum, where they left the range or ``WHOLE``: there are none."""
    rows, rows_in = tile_rows(tl.program_id(0), B, RM, TM)
    cols, cols_in = tile_rows(tl.program_id(1), O, RN, TN)
    b, o = rows.to(tl.int64)[:, None, :, None], cols[None, :, None, :]
    inside = (b < B) & (o < O)
    value = tl.zeros((RM, RN, TM, TN), tl.float32)
    good = value > 0
    if not WHOLE:
        for s in range(spans):
            value += tl.load(sums + (b + s * tl.cast(B, tl.int64)) * O + o, mask=inside, other=1)
        good = (value < float("inf")) & (value >= I * 1.9721522630525295e-31)  # 2^-102
        value = root(value / I, p, P)
        if SCALED:
            value /= tl.load(scales + (b // TILE_M) * tl.cdiv(O, TILE_N) + o // TILE_N, mask=inside, other=1)
    if tl.max(tl.reshape((inside & (good == 0)).to(tl.int32), (RM * RN * TM * TN,)), 0) > 0:
        step = tl.arange(0, BK)[:, None, None]
        x_at = x + rows_in.to(tl.int64)[None] * stride_x + step
        w_at = w + cols_in.to(tl.int64)[None] * stride_w + step
        top = tl.zeros((RM, RN, TM, TN), tl.float32)
        for k in tl.range(0, I, BK, num_stages=STAGES):
            m, n = load_tiles(x_at, w_at, k, I - step, EVEN)
            top = _largest(top, m, n, BK)
        lift = tl.where(top < 5.4e-20, 18446744073709551616.0, 1.0)  # 2^64: the inverse of a subnormal overflows
        inverse = tl.where(top > 0, 1 / (top * lift), 0.0)
        mean = tl.zeros((RM, RN, TM, TN), tl.float32)
        for k in tl.range(0, I, BK, num_stages=STAGES):
            m, n = load_tiles(x_at, w_at, k, I - step, EVEN)
            mean = _add_powers(mean, m, n, inverse, lift, p, P, 2, BK)
        redone = top * root(mean / I, p, P)
        # Where the maximum is 0 the root of 0 is not asked for; NaN differences reach the mean even then.
        value = tl.where(good, value, tl.where((top > 0) | (mean != mean), redone, 0.0))
    tl.store(y + b * O + o, value, mask=inside)


def forward(x: Tensor, w: Tensor, p: float, config: Config | None = None) -> Tensor:
    """``x`` [B, I], ``w`` [O, I] of a dtype of at most 32 bits -> float32 [B, O]."""
    x, w = rows_contiguous(x), rows_contiguous(w)
    (b, i), o = x.shape, len(w)
    y = torch.empty(b, o, device=x.device, dtype=torch.float32)
    if y.numel() == 0:
        return y
    power = compiled_exponent(p)
    config = config or CONFIGS[0]
    whole, scaled = not 0 < power <= WHOLE, power > UNSCALED
    tile_m, tile_n = config.rm * config.tm, config.rn * config.tn
    grid, spans, sums, scales = (triton.cdiv(b, tile_m), triton.cdiv(o, tile_n)), 0, y, y
    operands = {"x": x, "w": w, "B": b, "O": o, "I": i, "stride_x": x.stride(0), "stride_w": w.stride(0), "P": power}
    if not whole:
        slots = processors(x.device) * config.resident
        spans, span = cut(grid[0] * grid[1], i, config.bk, slots)
        sums = torch.empty(spans, b, o, device=x.device, dtype=torch.float32)
        scales = torch.empty(grid, device=x.device, dtype=torch.float32)
        _power_mean_forward_kernel[(*grid, spans)](
            **operands, sums=sums, scales=scales, span=span, SCALED=scaled, EVEN=i % config.bk == 0, **options(config)
        )
    _power_mean_finish_kernel[(triton.cdiv(b, FINISH.rm * FINISH.tm), triton.cdiv(o, FINISH.rn * FINISH.tn))](
        **operands, sums=sums, scales=scales, y=y, p=p, spans=spans, WHOLE=whole, SCALED=scaled,
        EVEN=i % FINISH.bk == 0, TILE_M=tile_m, TILE_N=tile_n, **options(FINISH),
    )  # fmt: skip
    return y
