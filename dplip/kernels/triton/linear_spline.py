# SPDX-License-Identifier: Apache-2.0
r"""Linear splines: values, derivatives, and coefficient gradients without atomics.

A coefficient gradient is a histogram: every program owns some channels, a run of examples and a block of knots,
compares the interval of each input with its knots, and writes its partial sums; those are then added in a fixed order.
Nothing depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "coefficient_grad", "forward"]

_BLOCK = 1024  # elements of one program of the elementwise kernels
_TILE = 256  # elements a histogram program reads at a time
_PROGRAMS = 1024  # histogram programs aimed at: a few for every multiprocessor


@triton.jit
def _locate(x, reach, scale, intervals):
    """Interval and fraction, as ``dplip.kernels.linear_spline.locate``."""
    inside = tl.minimum(tl.maximum(x, -reach), reach)
    t = (inside + reach) * scale
    index = tl.minimum(tl.maximum(tl.floor(t), 0.0), intervals - 1.0)  # NaN goes to 0: both return the other operand
    fraction = tl.minimum(tl.maximum(t - index, 0.0), 1.0)
    missing = x != x
    return tl.where(missing, 0, index.to(tl.int32)), tl.where(missing, x, fraction)


@triton.jit
def _linear_spline_forward_kernel(
    x, table, ends, y, N, C, S, reach, scale, knots, ENDS: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """``y`` [B, C, S] = ``phi_c(x)``; ``N`` = B C S."""
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = n < N
    c = n // S % C
    v = tl.load(x + n, mask=live, other=0).to(tl.float32)
    index, fraction = _locate(v, reach, scale, knots - 1)
    left = tl.load(table + c * knots + index, mask=live, other=0).to(tl.float32)
    right = tl.load(table + c * knots + index + 1, mask=live, other=0).to(tl.float32)
    value = left + (right - left) * fraction
    if ENDS:
        low = tl.load(ends + 2 * c, mask=live, other=0).to(tl.float32)
        high = tl.load(ends + 2 * c + 1, mask=live, other=0).to(tl.float32)
        # A slope of 0 times an infinite distance is 0.
        value += high * tl.where((v > reach) & (high != 0), v - reach, 0.0)
        value -= low * tl.where((v < -reach) & (low != 0), -reach - v, 0.0)
    tl.store(y + n, value.to(y.dtype.element_ty), mask=live)


@triton.jit
def _linear_spline_input_kernel(
    x, table, ends, dy, dx, N, C, S, reach, scale, knots, ENDS: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """``dx = phi_c'(x) dy``."""
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = n < N
    c = n // S % C
    v = tl.load(x + n, mask=live, other=0).to(tl.float32)
    index, _fraction = _locate(v, reach, scale, knots - 1)
    left = tl.load(table + c * knots + index, mask=live, other=0).to(tl.float32)
    right = tl.load(table + c * knots + index + 1, mask=live, other=0).to(tl.float32)
    slope = tl.where(tl.abs(v) > reach, 0.0, (right - left) * scale)
    if ENDS:
        slope = tl.where(v < -reach, tl.load(ends + 2 * c, mask=live, other=0).to(tl.float32), slope)
        slope = tl.where(v > reach, tl.load(ends + 2 * c + 1, mask=live, other=0).to(tl.float32), slope)
    tl.store(dx + n, (slope * tl.load(dy + n, mask=live, other=0).to(tl.float32)).to(dx.dtype.element_ty), mask=live)


@triton.jit
def _linear_spline_coefficient_kernel(
    x, dy, out, B, C, S, reach, scale, knots, share,
    CB: tl.constexpr, R: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """``out`` [runs, C, knots]: the coefficient gradient of ``share`` examples in a row."""
    run = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    k = tl.program_id(2) * KB + tl.arange(0, KB)
    first = run * share
    elements = tl.minimum(share, B - first) * S
    total = tl.zeros((CB, KB), tl.float32)
    for start in range(0, elements, R):
        r = start + tl.arange(0, R)
        example = first + r // S
        at = (example[None, :] * C + c[:, None]) * S + (r % S)[None, :]
        live = (c < C)[:, None] & (r < elements)[None, :]
        v = tl.load(x + at, mask=live, other=0).to(tl.float32)
        g = tl.load(dy + at, mask=live, other=0).to(tl.float32)
        index, fraction = _locate(v, reach, scale, knots - 1)
        gap = k[None, None, :] - index[:, :, None]
        right = (g * fraction)[:, :, None]
        left = (g * (1.0 - fraction))[:, :, None]
        total += tl.sum(tl.where(gap == 0, left, tl.where(gap == 1, right, 0.0)), 1)
    where = (run * C + c[:, None]) * knots + k[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=(c < C)[:, None] & (k < knots)[None, :])


def _elementwise(
    kernel: triton.JITFunction, x: Tensor, table: Tensor, reach: float, ends: Tensor | None, *tensors: Tensor
) -> None:
    n, knots = x.numel(), table.shape[1]
    if n:
        kernel[(triton.cdiv(n, _BLOCK),)](
            x, table, table if ends is None else ends, *tensors, n, x.shape[1], x.shape[2], reach,
            (knots - 1) / (2 * reach), knots, ENDS=ends is not None, R=_BLOCK, num_warps=4,
        )  # fmt: skip


def forward(x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> Tensor:
    """``y`` [B, C, S] in the dtype of ``x``, computed in float32."""
    x, table = x.contiguous(), coefficients.contiguous()
    y = torch.empty_like(x)
    ends = None if end_slopes is None else end_slopes.contiguous()
    _elementwise(_linear_spline_forward_kernel, x, table, reach, ends, y)
    return y


def backward(
    x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None, dy: Tensor, need_x: bool, need_c: bool
) -> tuple[Tensor, Tensor]:
    """``dx`` [B, C, S] and ``dc`` [C, K + 1], the same bits in every run; empty [0] where not needed."""
    x, table, dy = x.contiguous(), coefficients.contiguous(), dy.contiguous()
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    if need_x:
        ends = None if end_slopes is None else end_slopes.contiguous()
        _elementwise(_linear_spline_input_kernel, x, table, reach, ends, dy, dx)
    if not need_c:
        return dx, x.new_empty(0)
    if x.numel() == 0:
        return dx, torch.zeros_like(coefficients)
    wanted = max(1, _PROGRAMS // triton.cdiv(x.shape[1], _channels(x.shape[2] * len(x))))
    runs = min(max(1, len(x)), wanted)
    share = max(1, triton.cdiv(len(x), runs))
    return dx, _histogram(x, dy, table.shape[1], reach, share, torch.float32).sum(0).to(x.dtype)


def coefficient_grad(x: Tensor, knots: int, reach: float, dy: Tensor) -> Tensor:
    """Each example's coefficient gradient [B, C, knots]."""
    return _histogram(x.contiguous(), dy.contiguous(), knots, reach, 1, x.dtype)


def _channels(elements: int) -> int:
    """Channels of one program: enough to fill a tile where each has few elements, and to read neighbours together."""
    return min(32, max(1, _TILE // triton.next_power_of_2(max(1, elements))))


def _histogram(x: Tensor, dy: Tensor, knots: int, reach: float, share: int, dtype: torch.dtype) -> Tensor:
    B, C, S = x.shape
    runs = triton.cdiv(B, share)
    out = torch.empty(runs, C, knots, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    channels = max(_channels(share * S), 32 if S == 1 else 1)
    block = min(32, triton.next_power_of_2(knots))
    _linear_spline_coefficient_kernel[(triton.cdiv(C, channels), runs, triton.cdiv(knots, block))](
        x, dy, out, B, C, S, reach, (knots - 1) / (2 * reach), knots, share,
        CB=channels, R=max(1, _TILE // channels), KB=block, num_warps=4,
    )  # fmt: skip
    return out
