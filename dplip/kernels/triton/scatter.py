# SPDX-License-Identifier: Apache-2.0
r"""Gradients of selections: every output sends ``c_k dy`` to the one coordinate each order statistic credits.

Sums are float32 atomics, in no fixed order; or exact: contributions are rounded to multiples of a power of two at least
2^-47 below the largest of them and summed as int64, which gives the same bits in any order. The second is taken under
``torch.use_deterministic_algorithms(True)``. There, an infinite or NaN ``dy`` makes the whole gradient NaN.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels.triton.tile import DISTANCE, LOWER, VARYING

__all__ = ["scatter", "scatter_examples"]

_BLOCK = 512


@triton.jit
def _slopes(x, x2, w, KIND: tl.constexpr):
    """Derivatives of the element in x, x2 and w, each -1, 0 or 1; 0 where the element has a corner at 0."""
    d = x - w
    up = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
    if KIND == DISTANCE:
        return up, 0.0 * up, -up
    elif KIND == LOWER:
        below = tl.where(d > 0, 1.0, 0.0)
        above = tl.where((d <= 0) & (w - x2 > 0), 1.0, 0.0)
        return below, -above, above - below
    else:
        e = x2 - w
        far = tl.abs(e) > tl.abs(d)
        left = tl.where(far, 0.0, up)
        right = tl.where(far, tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, 0.0)), 0.0)
        return left, right, -left - right


@triton.jit
def _power_of_two(k):
    return ((k + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _add(out, at, value, scale, mask, EXACT: tl.constexpr):
    if EXACT:
        value = tl.where(tl.abs(value) < float("inf"), value, 0.0)  # else the sum is NaN by its peak
        tl.atomic_add(out + at, (value.to(tl.float64) * scale).to(tl.int64), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(out + at, value, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def _scatter_kernel(
    x, x2, w, c, index, dy, peak, dx, dx2, dw, N, O, I, x_row, w_row, room,
    KIND: tl.constexpr, K: tl.constexpr, INPUT: tl.constexpr, WEIGHT: tl.constexpr, EXACT: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """``dx``, ``dx2`` [B, I] and ``dw`` [O, I] gain one entry per output and order statistic."""
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = n < N
    b, o = n // O, n % O
    g = tl.load(dy + n, mask=live, other=0)
    scale = 1.0
    if EXACT:
        exponent = ((tl.load(peak).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
        scale = _power_of_two(room - tl.maximum(exponent, -126))
    for i in range(K):
        k = tl.load(index + n * K + i, mask=live, other=0).to(tl.int64)
        a = tl.load(x + b * x_row + k, mask=live, other=0).to(tl.float32)
        a2 = a if KIND == DISTANCE else tl.load(x2 + b * x_row + k, mask=live, other=0).to(tl.float32)
        px, px2, pw = _slopes(a, a2, tl.load(w + o * w_row + k, mask=live, other=0).to(tl.float32), KIND)
        s = g * tl.load(c + i).to(tl.float32)
        if INPUT:
            _add(dx, b * I + k, s * px, scale, live & (px != 0), EXACT)
            if KIND != DISTANCE:
                _add(dx2, b * I + k, s * px2, scale, live & (px2 != 0), EXACT)
        if WEIGHT:
            _add(dw, o * I + k, s * pw, scale, live & (pw != 0), EXACT)


@triton.jit(do_not_specialize=VARYING)
def _settle_kernel(sums, peak, out, N, room, R: tl.constexpr):
    """Exact sums back to float32; NaN where no finite scale existed."""
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    top = tl.load(peak)
    exponent = ((top.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
    value = tl.load(sums + n, mask=n < N).to(tl.float64) * _power_of_two(tl.maximum(exponent, -126) - room)
    tl.store(out + n, tl.where(tl.abs(top) < float("inf"), value, float("nan")).to(tl.float32), mask=n < N)


@triton.jit(do_not_specialize=VARYING)
def _examples_kernel(
    x, w, c, index, dy, out, N, O, I, x_row, w_row, K: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """``out`` [B, O, I]: the few entries of every example's weight gradient that are not zero."""
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = n < N
    g = tl.load(dy + n, mask=live, other=0)
    for i in range(K):
        k = tl.load(index + n * K + i, mask=live, other=0).to(tl.int64)
        a = tl.load(x + n // O * x_row + k, mask=live, other=0).to(tl.float32)
        b = tl.load(w + n % O * w_row + k, mask=live, other=0).to(tl.float32)
        sign = tl.where(a > b, -1.0, tl.where(a < b, 1.0, 0.0))
        tl.store(out + n * I + k, g * tl.load(c + i).to(tl.float32) * sign, mask=live & (sign != 0))


def _inner(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def scatter(
    x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor, need_x: bool, need_w: bool,
    x2: Tensor | None = None, kind: int = 0, exact: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients float32 in ``x`` [B, I], ``x2`` and ``w`` [O, I]; empty [0] where not needed.

    Args:
        index: int32 [B, O, K] or [B, O], the credited coordinates.
        dy: [B, O].
        exact: sum in an order-independent way; by default whether torch is asked to be deterministic.
    """
    exact = torch.are_deterministic_algorithms_enabled() if exact is None else exact
    x, w, dy, c = _inner(x), _inner(w), dy.float().contiguous(), c.float()
    x2 = x if x2 is None else _inner(x2)
    if x2.stride(0) != x.stride(0):
        x, x2 = x.contiguous(), x2.contiguous()
    (B, I), O, K = x.shape, len(w), len(c)
    dtype = torch.int64 if exact else torch.float32

    def zeros(rows: int, needed: bool) -> Tensor:
        return torch.zeros((rows, I) if needed else (0,), dtype=dtype, device=x.device)

    out = [zeros(B, need_x), zeros(B, need_x and kind != DISTANCE.value), zeros(O, need_w)]
    n = B * O
    peak = (dy.abs().amax() * c.abs().amax()).reshape(1) if exact and n else dy.new_ones(1)
    room = 62 - math.ceil(math.log2(max(2, max(B, O) * K)))
    if n:
        _scatter_kernel[(triton.cdiv(n, _BLOCK),)](
            x, x2, w, c, index, dy, peak, *out, n, O, I, x.stride(0), w.stride(0), room,
            KIND=kind, K=K, INPUT=need_x, WEIGHT=need_w, EXACT=exact, R=_BLOCK, num_warps=4,
        )  # fmt: skip
    if not exact:
        return out[0], out[1], out[2]
    settled = [torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in out]
    for sums, values in zip(out, settled, strict=True):
        if sums.numel():
            _settle_kernel[(triton.cdiv(sums.numel(), 1024),)](sums, peak, values, sums.numel(), room, R=1024)
    return settled[0], settled[1], settled[2]


def scatter_examples(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
    """Every example's own weight gradient of a distance, float32 [B, O, I]."""
    x, w, dy, c = _inner(x), _inner(w), dy.float().contiguous(), c.float()
    out = torch.zeros(len(x), len(w), x.shape[1], device=x.device)
    n = dy.numel()
    if n:
        _examples_kernel[(triton.cdiv(n, _BLOCK),)](
            x, w, c, index, dy, out, n, len(w), x.shape[1], x.stride(0), w.stride(0), K=len(c), R=_BLOCK, num_warps=4
        )
    return out
