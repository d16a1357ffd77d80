# SPDX-License-Identifier: Apache-2.0
r"""The K largest elements per output, exact at ties too, in four passes over a slab of examples at a time.

1. Keys: the maximum of every block of ``k``, as the float's 16 leading bits, rounded down.
2. Per output, the K + 2 blocks of largest key. The K largest elements are at least the K-th largest block maximum,
   hence at least the K-th key, the floor; they lie in blocks whose own key reaches it, nearly always in those kept.
3. The kept blocks are read again. Of each, the three largest elements above the floor enter a sorted list of K codes:
   the bits above the floor, then block and place, which make codes distinct.
4. Where more than K + 2 blocks reach the floor, or more than three elements of one block, or an element is more than
   2^23 units in the last place above it (NaN and infinity are), the output is put on a list, and done again by K maxima
   over all of ``k``. So the result never rests on the shortcut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels.triton.launch import Rows, Work, operands, options, tile_for
from dplip.kernels.triton.tile import (
    DISTANCE,
    VARYING,
    Tile,
    bits_of,
    block_max,
    difference,
    halves,
    load_operands,
    outputs_of,
    segment,
    tile_operands,
)

__all__ = ["top_k"]

_SLAB = 1 << 20  # outputs at a time: the keys stay within a few hundred MiB


# Tuples grow by concatenation: Triton knows no starred expressions.
@triton.jit
def _fill(value, S: tl.constexpr):
    out = ()
    for _ in tl.static_range(S):
        out = out + (value,)  # noqa: RUF005
    return out


@triton.jit
def _insert(kept, value, S: tl.constexpr):
    """The ``S`` largest of ``kept`` (descending) and ``value``."""
    out = ()
    for i in tl.static_range(S):
        out = out + (tl.maximum(kept[i], value),)  # noqa: RUF005
        value = tl.minimum(kept[i], value)
    return out


@triton.jit(do_not_specialize=VARYING)
def _keys_kernel(
    x, x2, w, keys, B, O, I, x_row, w_row, wide, plane, tiles_m, units, share, total, zero,
    KIND: tl.constexpr, MASK: tl.constexpr,
    RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    BK: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr, DIRECT: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``keys`` [units, plane] int32: bits 30 to 15 of the maxima of a unit's halves, the first in the low half.

    A plane is whole tiles, rows of ``wide`` outputs: stores need no mask.
    """
    I, x_row, w_row = I * VEC, x_row * VEC, w_row * VEC
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, total)
    ks = tl.arange(0, BK)[:, None, None]
    while first < last:
        tile, begin, end = segment(first, last, units)
        _, _, x_at, w_at = tile_operands(tile, tiles_m, B, O, x_row, w_row, ks, RM, RN, TM, TN)
        for unit in tl.range(begin, end, num_stages=STAGES):
            packed = tl.zeros((RM, RN, TM, TN), tl.int32)
            for half in tl.static_range(2):
                most = tl.zeros((RM, RN, TM, TN), tl.int32)
                for u in tl.static_range(U // 2):
                    k = unit * (BK * U) + (half * (U // 2) + u) * BK
                    a, a2, b = load_operands(x + x_at, x2 + x_at, w + w_at, ks, k, I, KIND, MASK)
                    most = block_max(most, a, a2, b, KIND, False, BK, RM, RN, TM, TN)
                packed |= (most >> 15) << (16 * half)
            at = outputs_of(tile, tiles_m, wide, zero, DIRECT, RM, RN, TM, TN)
            tl.store(keys + tl.cast(unit, tl.int64) * plane + at, packed)
        first += end - begin


@triton.jit(do_not_specialize=VARYING)
def _select_kernel(keys, chosen, N, O, wide, plane, units, S: tl.constexpr, R: tl.constexpr):
    """``chosen`` [S, N] int32: the S largest keys, each over its reversed block."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = n < N
    at = (n // O) * wide + n % O
    kept = _fill(tl.full((R,), -1, tl.int32), S)
    for unit in range(units):
        packed = tl.load(keys + unit * tl.cast(plane, tl.int64) + at, mask=live, other=0)
        kept = _insert(kept, ((packed & 0xFFFF) << 15) | (0x7FFF - 2 * unit), S)
        kept = _insert(kept, (((packed >> 16) & 0xFFFF) << 15) | (0x7FFE - 2 * unit), S)
    for i in tl.static_range(S):
        tl.store(chosen + i * tl.cast(N, tl.int64) + n, kept[i], mask=live)


@triton.jit
def _three_largest(v, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr):
    """``v`` [D, 1, R] as W = 1, 2 or 3 descending entries: a tuple of [D, 1, R]; merged down to D = 1."""
    if D == 1:
        return v
    else:
        a1, b1 = halves(v[0], D)
        c1 = tl.maximum(a1, b1)
        low = tl.minimum(a1, b1)
        if W == 1:
            return _three_largest((c1, low), D // 2, 2, R)
        else:
            a2, b2 = halves(v[1], D)
            c2 = tl.maximum(low, tl.maximum(a2, b2))
            c3 = tl.maximum(tl.minimum(a1, b2), tl.minimum(a2, b1))
            if W == 3:
                a3, b3 = halves(v[2], D)
                c3 = tl.maximum(c3, tl.maximum(a3, b3))
            return _three_largest((c1, c2, c3), D // 2, 3, R)


@triton.jit(do_not_specialize=VARYING)
def _gather_kernel(
    x, x2, w, chosen, c, y, index, redo, count, N, O, I, x_row, w_row,
    KIND: tl.constexpr, K: tl.constexpr, S: tl.constexpr, DEPTH: tl.constexpr, SHIFT: tl.constexpr,
    INDEX: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Values and indices; outputs that the shortcut does not settle join ``redo``."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = n < N
    b, o = n // O, n % O
    ks = tl.arange(0, DEPTH)[:, None]
    floor = tl.load(chosen + (K - 1) * tl.cast(N, tl.int64) + n, mask=live, other=0)
    floor = tl.where(floor < 0, 0, floor & -32768)
    kept = _fill(tl.zeros((R,), tl.uint32), K)
    unsettled = tl.zeros((R,), tl.int32)
    for s in tl.static_range(S):
        key = tl.load(chosen + s * tl.cast(N, tl.int64) + n, mask=live, other=-1)
        use = (key & -32768) >= floor
        if s == S - 1 and S > K:
            unsettled |= (use & (key >= 0)).to(tl.int32)
        k = (0x7FFF - (key & 0x7FFF))[None, :] * DEPTH + ks
        inside = (use & (key >= 0))[None, :] & (k < I)
        at_x, at_w = b.to(tl.int64)[None, :] * x_row + k, o.to(tl.int64)[None, :] * w_row + k
        a = tl.load(x + at_x, mask=inside, other=0)
        a2 = a if KIND == DISTANCE else tl.load(x2 + at_x, mask=inside, other=0)
        above = bits_of(difference(a, a2, tl.load(w + at_w, mask=inside, other=0), KIND)) - floor[None, :]
        good = inside & (above >= 0)
        unsettled |= (tl.max(tl.where(good, above, 0), 0) >> (32 - SHIFT)).to(tl.int32)
        unsettled |= (tl.sum(good.to(tl.int32), 0) > 3).to(tl.int32)
        code = (above.to(tl.uint32, bitcast=True) << SHIFT) | ((1 << SHIFT) - 1 - s * DEPTH - ks).to(tl.uint32)
        code = tl.reshape(tl.where(good, code, 0), (DEPTH, 1, R))
        m1, m2, m3 = _three_largest((code,), DEPTH, 1, R)
        kept = _insert(kept, tl.reshape(m1, (R,)), K)
        kept = _insert(kept, tl.reshape(m2, (R,)), K)
        kept = _insert(kept, tl.reshape(m3, (R,)), K)
    unsettled |= (kept[K - 1] == 0).to(tl.int32)
    total = tl.zeros((R,), tl.float32)
    for i in tl.static_range(K):
        bits = (kept[i] >> SHIFT).to(tl.int32, bitcast=True) + floor
        total += tl.load(c + i) * bits.to(tl.float32, bitcast=True)
        if INDEX:
            place = (1 << SHIFT) - 1 - (kept[i] & ((1 << SHIFT) - 1)).to(tl.int32)
            sure = live & (place < S * DEPTH)
            key = tl.load(chosen + (place // DEPTH) * tl.cast(N, tl.int64) + n, mask=sure, other=0)
            k = (0x7FFF - (key & 0x7FFF)) * DEPTH + place % DEPTH
            tl.store(index + n.to(tl.int64) * K + i, k, mask=sure)
    tl.store(y + n, total, mask=live)
    again = live & (unsettled != 0)
    slot = tl.atomic_add(count + tl.zeros((R,), tl.int32), 1, mask=again, sem="relaxed")
    tl.store(redo + slot, n, mask=again)


@triton.jit(do_not_specialize=VARYING)
def _exact_kernel(
    x, x2, w, redo, count, c, y, index, O, I, x_row, w_row,
    KIND: tl.constexpr, K: tl.constexpr, INDEX: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Listed outputs by K maxima, each below the one before."""
    for i in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        n = tl.load(redo + i)
        xp, x2p = x + (n // O).to(tl.int64) * x_row, x2 + (n // O).to(tl.int64) * x_row
        wp = w + (n % O).to(tl.int64) * w_row
        bound = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
        total = 0.0
        for j in range(K):
            best = tl.full((), -1, tl.int64)
            for k0 in range(0, I, SPAN):
                k = k0 + tl.arange(0, SPAN)
                a = tl.load(xp + k, mask=k < I, other=0)
                a2 = a if KIND == DISTANCE else tl.load(x2p + k, mask=k < I, other=0)
                bits = bits_of(difference(a, a2, tl.load(wp + k, mask=k < I, other=0), KIND))
                code = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - k).to(tl.int64)
                best = tl.maximum(best, tl.max(tl.where((k < I) & (code < bound), code, -1), 0))
            total += tl.load(c + j) * (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            if INDEX:
                tl.store(index + n.to(tl.int64) * K + j, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32))
            bound = best
        tl.store(y + n, total)


def top_k(
    x: Tensor, w: Tensor, c: Tensor, with_index: bool, x2: Tensor | None = None, kind: int = 0, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """``sum_k c_k e_(k)`` [B, O] float32 and, if asked for, the credited indices int32 [B, O, K], largest first.

    Indices are distinct and the same in every run; which of several equal elements comes first is not specified.

    Raises:
        ValueError: more coordinates than block numbers reach.
    """
    x, w, x2 = operands(x, w, x2, False)
    c = c.float()
    (B, I), O, K = x.shape, len(w), len(c)
    y = x.new_empty(B, O)
    index = torch.empty((B, O, K) if with_index else (0,), dtype=torch.int32, device=x.device)
    if y.numel() == 0:
        return y, index
    tile = tile or tile_for("keys", B, O, I)
    S, units, depth = K + 2, -(-I // tile.depth), tile.depth // 2
    if 2 * units >= 1 << 15:
        raise ValueError(f"order_statistic: expected fewer than {depth << 15} coordinates, got {I}; split them")
    examples, wide = max(1, min(B, _SLAB // O)), -(-O // tile.columns) * tile.columns
    plane = -(-examples // tile.rows) * tile.rows * wide
    shapes = {"keys": (units, plane), "chosen": (S, examples * O), "redo": (examples * O,)}
    keys, chosen, redo = (torch.empty(shape, dtype=torch.int32, device=x.device) for shape in shapes.values())
    counts = torch.zeros(B, dtype=torch.int32, device=x.device)
    rows, where = Rows.of(x, w), (O, I, x.stride(0), w.stride(0))
    common = {"KIND": kind, "K": K, "INDEX": with_index}
    gather = {"S": S, "DEPTH": depth, "SHIFT": (S * depth - 1).bit_length(), "R": 32, "num_warps": 1, "maxnreg": 128}
    span = min(4096, triton.next_power_of_2(I))
    for start in range(0, B, examples):
        part = slice(start, start + examples)
        a, a2, out, at, count = x[part], x2[part], y[part], index[part] if with_index else index, counts[start:]
        n, work = out.numel(), Work.of(tile, len(a), O, I, x.device)
        _keys_kernel[(work.programs,)](
            a, a2, w, keys, len(a), O, *rows.sizes, wide, plane, *work.split,
            KIND=kind, MASK=I % tile.depth != 0, VEC=rows.vec, **options(tile),
        )  # fmt: skip
        _select_kernel[(triton.cdiv(n, 128),)](keys, chosen, n, O, wide, plane, units, S=S, R=128, num_warps=4)
        _gather_kernel[(triton.cdiv(n, 32),)](a, a2, w, chosen, c, out, at, redo, count, n, *where, **gather, **common)
        _exact_kernel[(min(triton.cdiv(n, 8), 2048),)](
            a, a2, w, redo, count, c, out, at, *where, SPAN=span, num_warps=4 if span <= 1024 else 8, **common
        )
    return y, index
