# SPDX-License-Identifier: Apache-2.0
r"""The largest element per output: l_inf distances, their index, and both ends of their range over a box.

The index is found by bracket: the main loop only remembers which unit of ``k`` held the maximum, and a second kernel
rescans that one unit for the lowest index. Units of equal maxima go to the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels.triton.launch import Rows, Work, operands, options, packed, row_slabs, tile_for
from dplip.kernels.triton.tile import (
    DISTANCE,
    LOWER,
    VARYING,
    Tile,
    bits_of,
    block_max,
    block_range,
    difference,
    farthest,
    half_max,
    load_operands,
    outputs_of,
    segment,
    tile_operands,
)

__all__ = ["interval", "largest", "largest_with_index"]


@triton.jit(do_not_specialize=VARYING)
def _largest_kernel(
    x, x2, w, c, out, B, O, I, x_row, w_row, tiles_m, units, share, total, zero,
    KIND: tl.constexpr, BRACKET: tl.constexpr, HALF: tl.constexpr, SHORT: tl.constexpr,
    RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    BK: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr, DIRECT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``out`` [B, O], zero before: int32 bits of ``c max_k e``; with ``BRACKET`` int64, them over the reversed unit."""
    I, x_row, w_row = I * VEC, x_row * VEC, w_row * VEC
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, total)
    ks = tl.arange(0, BK)[:, None, None]
    while first < last:
        tile, begin, end = segment(first, last, units)
        rm, rn, x_at, w_at = tile_operands(tile, tiles_m, B, O, x_row, w_row, ks, RM, RN, TM, TN)
        best = tl.zeros((RM, RN, TM, TN), tl.int32)
        where = tl.zeros((RM, RN, TM, TN), tl.int32)
        for unit in tl.range(begin, end, num_stages=STAGES):
            # The last unit reaches back over its predecessor instead of past the end: a maximum may count twice.
            k0 = unit * (BK * U) if SHORT else tl.minimum(unit * (BK * U), I - BK * U)
            most = tl.zeros((RM, RN, TM, TN), tl.int32) if BRACKET else best
            for u in tl.static_range(U):
                a, a2, b = load_operands(x + x_at, x2 + x_at, w + w_at, ks, k0 + u * BK, I, KIND, SHORT)
                most = block_max(most, a, a2, b, KIND, HALF, BK, RM, RN, TM, TN)
            if BRACKET:
                if HALF:
                    most = half_max(most)
                up = most > best
                best = tl.where(up, most, best)
                where = tl.where(up, unit, where)
            else:
                best = most
        at = outputs_of(tile, tiles_m, O, zero, DIRECT, RM, RN, TM, TN)
        live = (rm[:, None, :, None] < B) & (rn[None, :, None, :] < O)
        if BRACKET:
            key = (best.to(tl.int64) << 32) | (0x7FFFFFFF - where).to(tl.int64)
            tl.atomic_max(out + at, key, mask=live, sem="relaxed")
        else:
            value = (half_max(best) if HALF else best).to(tl.float32, bitcast=True) * tl.load(c).to(tl.float32)
            tl.atomic_max(out + at, bits_of(value), mask=live, sem="relaxed")
        first += end - begin


@triton.jit
def _rescan_kernel(
    x, x2, w, c, key, y, index, O, I, x_row, w_row,
    KIND: tl.constexpr, SHORT: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Value and lowest index of the maximum within the unit that ``key`` names."""
    b = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * R + tl.arange(0, R)
    live = o < O
    unit = 0x7FFFFFFF - (tl.load(key + b * O + o, mask=live, other=0x7FFFFFFF) & 0x7FFFFFFF).to(tl.int32)
    ks = tl.arange(0, SPAN)[None, :]
    k0 = unit * DEPTH if SHORT else tl.minimum(unit * DEPTH, I - DEPTH)
    k = k0[:, None] + ks
    inside = live[:, None] & (ks < DEPTH) & (k < I)
    at_x, at_w = b * x_row + k, o.to(tl.int64)[:, None] * w_row + k
    a = tl.load(x + at_x, mask=inside, other=0).to(tl.float32)
    a2 = a if KIND == DISTANCE else tl.load(x2 + at_x, mask=inside, other=0).to(tl.float32)
    d = difference(a, a2, tl.load(w + at_w, mask=inside, other=0).to(tl.float32), KIND)
    bits = bits_of(d)
    best = tl.max(bits, 1)
    found = tl.min(tl.where((bits == best[:, None]) & inside, ks, SPAN), 1)
    tl.store(y + b * O + o, best.to(tl.float32, bitcast=True) * tl.load(c).to(tl.float32), mask=live)
    tl.store(index + b * O + o, k0 + found, mask=live)


@triton.jit(do_not_specialize=VARYING)
def _interval_kernel(
    x, x2, w, c, low, high, B, O, I, x_row, w_row, tiles_m, units, share, total, zero,
    SHORT: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    BK: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr, DIRECT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``c max_k max(x - w, w - x2, 0)`` and ``c max_k max(|x - w|, |x2 - w|)`` in one pass."""
    I, x_row, w_row = I * VEC, x_row * VEC, w_row * VEC
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, total)
    ks = tl.arange(0, BK)[:, None, None]
    while first < last:
        tile, begin, end = segment(first, last, units)
        rm, rn, x_at, w_at = tile_operands(tile, tiles_m, B, O, x_row, w_row, ks, RM, RN, TM, TN)
        least = tl.zeros((RM, RN, TM, TN), tl.int32)
        most = tl.zeros((RM, RN, TM, TN), tl.int32)
        for unit in tl.range(begin, end, num_stages=STAGES):
            k0 = unit * (BK * U) if SHORT else tl.minimum(unit * (BK * U), I - BK * U)
            for u in tl.static_range(U):
                a, a2, b = load_operands(x + x_at, x2 + x_at, w + w_at, ks, k0 + u * BK, I, LOWER, SHORT)
                least, most = block_range(least, most, a, a2, b, BK, RM, RN, TM, TN)
        at = outputs_of(tile, tiles_m, O, zero, DIRECT, RM, RN, TM, TN)
        live = (rm[:, None, :, None] < B) & (rn[None, :, None, :] < O)
        scale = tl.load(c)
        bottom = least.to(tl.float32, bitcast=True) * scale
        top = farthest(least, most) * scale
        tl.atomic_max(low + at, bits_of(bottom), mask=live, sem="relaxed")
        tl.atomic_max(high + at, bits_of(top), mask=live, sem="relaxed")
        first += end - begin


def largest(
    x: Tensor, w: Tensor, c: Tensor, x2: Tensor | None = None, kind: int = 0, tile: Tile | None = None
) -> Tensor:
    """``c max_k e(x_k, w_k)`` [B, O] float32, for ``c`` [1] >= 0; ``kind`` is one of :mod:`tile`'s.

    float16 operands of :data:`DISTANCE` are subtracted and compared in float16, two at a time; their maximum carries
    its rounding error of up to 2^-11 relative.
    """
    half = packed(x, w) and kind == DISTANCE.value
    x, w, x2 = operands(x, w, x2, half)
    y = torch.zeros(len(x), len(w), device=x.device)
    _largest(x, x2, w, c, y.view(torch.int32), kind, False, half, tile)
    return y


def _largest(
    x: Tensor, x2: Tensor, w: Tensor, c: Tensor, out: Tensor, kind: int, bracket: bool, half: bool, tile: Tile | None
) -> tuple[int, bool]:
    """Fills ``out``; returns the depth of a unit in coordinates and whether they are fewer than that."""
    I, O = x.shape[1], len(w)
    tile = tile or tile_for(("half_" if half else "") + ("index" if bracket else "largest"), len(x), O, I)
    rows = Rows.of(x, w)
    for part in row_slabs(len(x), O):
        a = x[part]
        work = Work.of(tile, len(a), O, I, x.device)
        _largest_kernel[(work.programs,)](
            a, x2[part], w, c, out[part], len(a), O, *rows.sizes, *work.split,
            KIND=kind, BRACKET=bracket, HALF=half, SHORT=tile.depth > I, VEC=rows.vec, **options(tile),
        )  # fmt: skip
    return tile.depth * (2 if half else 1), tile.depth > I


def largest_with_index(
    x: Tensor, w: Tensor, c: Tensor, x2: Tensor | None = None, kind: int = 0, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`largest` and the lowest index that attains it, int32 [B, O].

    With float16 operands the index may point to an element within rounding of the largest; the value returned is that
    element's, exact.
    """
    half = packed(x, w) and kind == DISTANCE.value
    a, b, a2 = operands(x, w, x2, half)
    key = torch.zeros(len(x), len(w), dtype=torch.int64, device=x.device)
    y, index = torch.empty(key.shape, device=x.device), torch.empty(key.shape, dtype=torch.int32, device=x.device)
    if y.numel() == 0:
        return y, index
    depth, short = _largest(a, a2, b, c, key, kind, True, half, tile)
    if half:  # the rescan reads the same pairs one by one
        a, b = a.view(torch.float16), b.view(torch.float16)
        a2 = a
    rows = 32
    _rescan_kernel[(len(x), triton.cdiv(len(w), rows))](
        a, a2, b, c, key, y, index, len(w), a.shape[1], a.stride(0), b.stride(0),
        KIND=kind, SHORT=short, DEPTH=depth, SPAN=triton.next_power_of_2(depth), R=rows, num_warps=4,
    )  # fmt: skip
    return y, index


def interval(lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Exact range of every l_inf distance over ``lower <= x <= upper``, both [B, O] float32."""
    lower, w, upper = operands(lower, w, upper, False)
    (B, I), O = lower.shape, len(w)
    low, high = torch.zeros(2, B, O, device=lower.device)
    tile, rows = tile or tile_for("interval", B, O, I), Rows.of(lower, w)
    for part in row_slabs(B, O):
        a = lower[part]
        work = Work.of(tile, len(a), O, I, a.device)
        _interval_kernel[(work.programs,)](
            a, upper[part], w, c, low[part].view(torch.int32), high[part].view(torch.int32), len(a), O, *rows.sizes,
            *work.split, SHORT=tile.depth > I, VEC=rows.vec, **options(tile),
        )  # fmt: skip
    return low, high
