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

__all__ = ["BACKWARD_CONFIGS", "CONFIGS", "backward", "forward", "ghost_factor", "per_sample_weight_grad"]


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
    Config(16, 1, 8, 32, 4, 2, 2),
    Config(16, 2, 4, 32, 2, 3, 3),
)
FINISH = Config(4, 8, 16, 8, 4, 2, 3)
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
def _mean_term(t, p, P: tl.constexpr):
    """``|t|^p``; ``P`` is p where it is a compile-time integer, else 0."""
    if P == 0:
        return tl.exp2(p * tl.log2(tl.abs(t)))
    if P % 2 == 1:
        t = tl.abs(t)
    return _power(t, P)


@triton.jit
def _row_term(u, p, P: tl.constexpr):
    """``sign(u) |u|^(p-1)``, its last product left to be fused with a sum."""
    if P == 0:
        size = tl.exp2((p - 1) * tl.log2(tl.abs(u)))
        return tl.where(u < 0, -size, size)
    if P == 2:
        return u
    if P % 2 == 1:  # the odd power below carries the sign
        return _power(u, P - 2) * tl.abs(u)
    if P > 4 and P % 3 == 1:  # u^(p-1) = (u^3)^((p-1)/3): two products less at p = 64
        cube = u * u * u
        return _power(cube, (P - 1) // 3 - 1) * cube
    return _power(u, P - 2) * u


@triton.jit
def _rows(pid, n, R: tl.constexpr, T: tl.constexpr):
    """Indices [R, T] of a tile, and the same kept inside ``n``."""
    rows = pid * (R * T) + tl.arange(0, R)[:, None] * T + tl.arange(0, T)[None, :]
    return rows, tl.minimum(rows, n - 1)


@triton.jit
def _differences(x_at, w_at, k, end, EVEN: tl.constexpr):
    """``x - w`` [BK, RM, RN, TM, TN] at coordinates ``k`` [BK, 1, 1]; 0 from ``end`` on."""
    if EVEN:
        a, b = tl.load(x_at + k), tl.load(w_at + k)
    else:
        a, b = tl.load(x_at + k, mask=k < end, other=0), tl.load(w_at + k, mask=k < end, other=0)
    return a.to(tl.float32)[:, :, None, :, None], b.to(tl.float32)[:, None, :, None, :]


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
            a, b = _differences(x_at, w_at, k, I - step, False)
            top = tl.maximum(top, tl.max(tl.abs(a - b), 0))
        scale = _power_of_two(tl.max(tl.reshape(top, (RM * RN * TM * TN,)), 0))
        if tl.program_id(2) == 0:
            tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)
    total = tl.zeros((RM, RN, TM, TN), tl.float32)
    start = tl.program_id(2) * span
    end = tl.minimum(start + span, I)
    for k in tl.range(start, end, BK, num_stages=STAGES):
        a, b = _differences(x_at, w_at, k, end - step, EVEN)
        t = tl.fma(a, scale, -(b * scale)) if SCALED else a - b
        total += tl.sum(_mean_term(t, 0.0, P), 0)
    at = (tl.program_id(2).to(tl.int64) * B + rows.to(tl.int64)[:, None, :, None]) * O + cols[None, :, None, :]
    tl.store(sums + at, total, mask=(rows < B)[:, None, :, None] & (cols < O)[None, :, None, :])


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
        total = tl.zeros((RM, RN, TM, TN), tl.float64)
        for s in range(spans):
            total += tl.load(sums + (b + s * tl.cast(B, tl.int64)) * O + o, mask=inside, other=1).to(tl.float64)
        good = (total < float("inf")) & (total >= I * 5.0e-31)  # 2^-102 = 1.97e-31
        value = tl.exp2(tl.log2(total / I) / p).to(tl.float32)
        if SCALED:
            value /= tl.load(scales + (b // TILE_M) * tl.cdiv(O, TILE_N) + o // TILE_N, mask=inside, other=1)
    if tl.max(tl.reshape((inside & (good == 0)).to(tl.int32), (RM * RN * TM * TN,)), 0) > 0:
        step = tl.arange(0, BK)[:, None, None]
        x_at = x + rows_in.to(tl.int64)[None] * stride_x + step
        w_at = w + cols_in.to(tl.int64)[None] * stride_w + step
        top = tl.zeros((RM, RN, TM, TN), tl.float32)
        for k in tl.range(0, I, BK, num_stages=STAGES):
            m, n = _differences(x_at, w_at, k, I - step, EVEN)
            top = tl.maximum(top, tl.max(tl.abs(m - n), 0))
        lift = tl.where(top < 5.4e-20, 18446744073709551616.0, 1.0)  # 2^64: the inverse of a subnormal overflows
        inverse = tl.where(top > 0, 1 / (top * lift), 0.0)
        mean = tl.zeros((RM, RN, TM, TN), tl.float32)
        for k in tl.range(0, I, BK, num_stages=STAGES):
            m, n = _differences(x_at, w_at, k, I - step, EVEN)
            mean += tl.sum(_mean_term((m - n) * lift * inverse, p, P), 0)
        redone = top * tl.exp2(tl.log2(mean.to(tl.float64) / I) / p).to(tl.float32)
        # Where the maximum is 0 the root of 0 is not asked for; NaN differences reach the mean even then.
        value = tl.where(good, value, tl.where((top > 0) | (mean != mean), redone, 0.0))
    tl.store(y + b * O + o, value, mask=inside)


@triton.jit
def _power_mean_coefficient_kernel(
    y, dy, a, q, B, O, I, stride_y, stride_dy, rows, columns, p,
    P: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What multiplies differences in the backward kernels, [rows, columns]: zero outside B x O and where ``y`` is 0.

    ``P`` > 0: ``a`` of the module's docstring; ``UNIT`` or ``P`` = 0: ``a = 1 / ||x - w||_p``, ``q = dy I^(-1/p)``.
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
        if P == 0:
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
    """``dy r`` for differences ``t`` and the coefficients of their outputs."""
    if P > 0:
        return _row_term(t * a, p, P)
    share = tl.abs(t) * a
    share = tl.where(share > 1, 1.0, share)
    return q * _row_term(tl.where(t < 0, -share, share), p, P)


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
    here = tl.load(x + rows_in.to(tl.int64)[:, None, :, None] * stride_x + cols_in[None, :, None, :]).to(tl.float32)
    grad = tl.zeros((RM, RN, TM, TN), tl.float32)
    step = tl.arange(0, BK)[:, None, None]
    start = tl.program_id(2) * span
    for k in tl.range(start, tl.minimum(start + span, O), BK, num_stages=STAGES):
        neuron = k + step
        there = tl.load(w + tl.minimum(neuron, O - 1).to(tl.int64) * stride_w + cols_in[None]).to(tl.float32)
        coefficient = tl.load(a + rows.to(tl.int64)[None] * columns + neuron)
        weight = coefficient
        if P == 0:
            weight = tl.load(q + rows.to(tl.int64)[None] * columns + neuron)
        t = here[None] - there[:, None, :, None, :]
        s = _cotangents(t, coefficient[:, :, None, :, None], weight[:, :, None, :, None], p, P)
        if WANT_X:
            grad += tl.sum(s, 0)
        if WANT_W:
            part = tl.sum(tl.sum(s, 1), 2)
            at = (tl.program_id(0).to(tl.int64) * O + neuron) * I + cols[None]
            tl.store(dw + at, -part, mask=(neuron < O) & (cols < I)[None])
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
    if P == 0:
        weight = tl.load(q + b * columns + o, mask=o < O, other=0)
    tl.store(grad + (b * O + o) * I + i, -_cotangents(t, coefficient, weight, p, P), mask=inside)


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
        m, n = _differences(x_at, w_at, k, I - step, EVEN)
        s = _cotangents(m - n, coefficient[None], 1.0, p, P)
        total += tl.sum(s * s, 0)
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
    """``t`` itself if its rows are contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _exponent(p: float) -> int:
    """``p`` if compiled as an integer: powers of two and up to 64 multiplication wins against exp2 and log2; else 0."""
    whole = int(p) if p == int(p) else 0
    return whole if whole <= 64 or (whole <= 1024 and whole & (whole - 1) == 0) else 0


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
    q = a if unit or power else torch.empty_like(a)
    _power_mean_coefficient_kernel[(triton.cdiv(a.numel(), 1024),)](
        y=y, dy=dy, a=a, q=q, B=b, O=o, I=i, stride_y=y.stride(0), stride_dy=dy.stride(0), rows=rows,
        columns=columns, p=p, P=power, UNIT=unit, BLOCK=1024, num_warps=4,
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
        parts_x = x.new_empty(spans if want_x else 0, len(part), i, dtype=torch.float32)
        parts_w = x.new_empty(grid[0] if want_w else 0, o, i, dtype=torch.float32)
        _power_mean_backward_kernel[(*grid, spans)](
            x=part, w=w, a=a[rows], q=q[rows], dx=parts_x, dw=parts_w, B=len(part), O=o, I=i, stride_x=x.stride(0),
            stride_w=w.stride(0), span=span, WANT_X=want_x, WANT_W=want_w, **coefficients, **_tile(config),
        )  # fmt: skip
        if want_x:
            dx[rows] = parts_x.sum(0) if spans > 1 else parts_x[0]
        if want_w:
            dw += parts_w.sum(0) if grid[0] > 1 else parts_w[0]
    return dx, dw


def per_sample_weight_grad(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
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


def ghost_factor(x: Tensor, w: Tensor, y: Tensor, p: float, config: Config = FINISH) -> Tensor:
    """``sum_i (|x - w| / ||x - w||_p)^(2 (p-1))`` [B, O]: what ``dy^2`` is weighted with in an example's squared norm."""
    x, w = _inner(x), _inner(w)
    (b, i), o = x.shape, len(w)
    factor = torch.empty(b, o, device=x.device, dtype=torch.float32)
    if factor.numel():
        a, _, coefficients = _coefficients(y, None, i, p, _exponent(p))
        _power_mean_ghost_kernel[(triton.cdiv(b, config.rm * config.tm), triton.cdiv(o, config.rn * config.tn))](
            x=x, w=w, a=a, factor=factor, B=b, O=o, I=i, stride_x=x.stride(0), stride_w=w.stride(0),
            EVEN=i % config.bk == 0, **coefficients, **_tile(config),
        )  # fmt: skip
    return factor
