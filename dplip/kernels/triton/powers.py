# SPDX-License-Identifier: Apache-2.0
"""Tiles, powers and launches shared by the power-mean kernels.

A thread holds a tile of ``RM x RN`` outputs: tensors are shaped ``[.., RM, RN, TM, TN]`` with ``TM * TN`` threads, so
Triton's default layout puts the register tile on the leading axes and each loaded value is used ``RM`` or ``RN`` times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels.triton.launch import register_cap
from dplip.kernels.triton.tile import PLAIN

__all__ = [
    "SMALL", "Config", "add_power", "compiled_exponent", "cut", "load_tiles", "log2", "options", "outer",
    "power", "root", "row_factors", "rows_contiguous",
]  # fmt: skip


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


SMALL = Config(2, 4, 16, 8, 8, 2, 4)


@triton.jit
def power(t, P: tl.constexpr):
    """``t^P`` by squaring."""
    result = t
    if P > 1:
        half = power(t, P // 2)
        result = half * half
        if P % 2 == 1:
            result = result * t
    return result


@triton.jit
def log2(a, P: tl.constexpr):
    """Base-2 logarithm: the chip's for ``P`` = 0, off by at most 2^-22 below 2; the slow exact one for ``P`` = -1."""
    if P < 0 or PLAIN:
        result = tl.log2(a)
    else:
        result = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [a], tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def add_power(total, t, p, P: tl.constexpr):
    """``total + |t|^p``; ``P`` as :func:`_exponent` gives it."""
    if P <= 0:
        result = total + tl.exp2(p * log2(tl.abs(t), P))
    elif P % 2 == 0:
        half = power(t, P // 2)
        result = tl.fma(half, half, total)
    else:
        result = tl.fma(power(t, P - 1), tl.abs(t), total)
    return result


@triton.jit
def row_factors(u, p, P: tl.constexpr):
    """Two factors of ``sign(u) |u|^(p-1)``, for their product to be fused with a sum."""
    if P <= 0:  # the logarithm is lowered by its error, so no row exceeds its bound on its account
        log = log2(tl.abs(u), P) - (2.4e-7 if P == 0 else 0.0)
        first, second = tl.where(u < 0, -1.0, 1.0), tl.exp2((p - 1) * log)
    elif P == 2:
        first, second = u, tl.full(u.shape, 1.0, tl.float32)
    elif P % 2 == 1:  # the odd power carries the sign
        first, second = power(u, P - 2), tl.abs(u)
    elif P > 4 and P % 3 == 1:  # u^(p-1) = (u^3)^((p-1)/3): two products less at p = 64
        second = u * u * u
        first = power(second, (P - 1) // 3 - 1)
    else:
        first, second = power(u, P - 2), u
    return first, second


@triton.jit
def load_tiles(x_at, w_at, k, end, EVEN: tl.constexpr):
    """``x`` [BK, RM, TM] and ``w`` [BK, RN, TN] at coordinates ``k`` [BK, 1, 1]; 0 from ``end`` on."""
    if EVEN:
        a, b = tl.load(x_at + k), tl.load(w_at + k)
    else:
        a, b = tl.load(x_at + k, mask=k < end, other=0), tl.load(w_at + k, mask=k < end, other=0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def outer(a, b):
    """``a`` [1, RM, TM] and ``b`` [1, RN, TN] shaped to meet in [RM, RN, TM, TN]."""
    RM: tl.constexpr = a.shape[1]
    TM: tl.constexpr = a.shape[2]
    RN: tl.constexpr = b.shape[1]
    TN: tl.constexpr = b.shape[2]
    return tl.reshape(a, (RM, 1, TM, 1)), tl.reshape(b, (1, RN, 1, TN))


@triton.jit
def root(mean, p, P: tl.constexpr):
    """``mean^(1/p)``: square roots where they do; else in float64, as float32 loses digits to the logarithm."""
    if P == 2 or P == 4 or P == 8 or P == 16 or P == 32 or P == 64:
        result = tl.sqrt_rn(mean)
        if P > 2:
            result = root(result, p, P // 2)
    else:
        result = tl.exp2(tl.log2(mean.to(tl.float64)) / p).to(tl.float32)
    return result


def cut(tiles: int, length: int, unit: int, slots: int) -> tuple[int, int]:
    """How many spans to cut a loop of ``length`` into, and how long, to fill whole waves of ``slots`` programs."""
    units, best = triton.cdiv(length, unit), (0.0, 1)
    for spans in range(1, max(1, min(16, units // 8)) + 1):
        waves = triton.cdiv(tiles * spans, slots)
        used = tiles * units / (waves * slots * (triton.cdiv(units, spans) + 2))  # 2: what starting and ending costs
        if used > 1.02 * best[0]:
            best = used, spans
    span = triton.cdiv(units, best[1]) * unit
    return triton.cdiv(length, span), span


def rows_contiguous(t: Tensor) -> Tensor:
    """``t`` itself if its rows are contiguous.

    Raises:
        TypeError: ``t`` is float64, which these kernels would round.
    """
    if t.dtype == torch.float64:
        raise TypeError("power_mean: expected at most float32 for the Triton kernels, got float64; use the reference")
    return t if t.stride(-1) == 1 else t.contiguous()


def compiled_exponent(p: float) -> int:
    """``p`` where multiplication wins, compiled for it: whole up to 64, powers of two up to 1024.

    Else 0, for exp2 and log2; -1 above 1024, where the chip's log2 is too coarse.
    """
    whole = int(p) if p == int(p) else 0
    if 0 < whole <= 64 or (whole <= 1024 and whole & (whole - 1) == 0):
        return whole
    return 0 if p <= 1024 else -1


def options(config: Config) -> dict[str, Any]:
    """Keyword arguments of a launch; registers are capped so that ``resident`` programs fit a processor."""
    return {
        "RM": config.rm, "RN": config.rn, "TM": config.tm, "TN": config.tn, "BK": config.bk,
        "STAGES": config.stages, "num_warps": config.warps, "maxnreg": register_cap(config.resident, config.warps),
        "enable_fp_fusion": True,
    }  # fmt: skip
