# SPDX-License-Identifier: Apache-2.0
r"""The K largest elements per output, exact at ties too, in four passes over a slab of examples at a time.

1. The maximum of every unit of ``k``, as a 16-bit key: the float's leading bits, rounded down.
2. Per output, the K + 2 units of largest key. The K largest elements lie in units whose maximum is at least the K-th
   largest of these maxima, hence in units whose key is at least the K-th key, which is nearly always one of those kept.
3. The kept units are read again. Elements at or above the K-th key, a few more than K, are the candidates.
4. Per output, candidates are sorted by value, then index.

An output for which more than K + 2 units reach the K-th key, or which has more candidates than places, is flagged, and
a last kernel does it again by K exact maxima over all of ``k``. So the result never depends on the shortcut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels.triton.launch import Work, operands, options, tile_for
from dplip.kernels.triton.tile import DISTANCE, VARYING, Tile, bits_of, block_max, difference, locate_tile, outputs_of

__all__ = ["top_k"]

_SLAB = 1 << 19  # outputs at a time: keys and candidates then stay within a few hundred MiB


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
    x, x2, w, keys, B, O, I, x_row, w_row, tiles_m, units, share, total,
    KIND: tl.constexpr, MASK: tl.constexpr,
    RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
    BK: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``keys`` [units, B, O] uint16: bits 30 to 15 of each unit's maximum."""
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, total)
    ks = tl.arange(0, BK)[:, None, None]
    while first < last:
        tile = first // units
        begin = first - tile * units
        end = tl.minimum(units, begin + last - first)
        rm, rn = locate_tile(tile, tiles_m, B, O, RM, RN, TM, TN)
        at, live = outputs_of(rm, rn, B, O)
        xs = tl.minimum(rm, B - 1).to(tl.int64)[None] * x_row + ks
        wp = w + tl.minimum(rn, O - 1).to(tl.int64)[None] * w_row + ks
        for unit in tl.range(begin, end, num_stages=STAGES):
            most = tl.zeros((RM, RN, TM, TN), tl.int32)
            for u in tl.static_range(U):
                k = unit * (BK * U) + u * BK
                if MASK:
                    a = tl.load(x + xs + k, mask=ks + k < I, other=0)
                    a2 = a if KIND == DISTANCE else tl.load(x2 + xs + k, mask=ks + k < I, other=0)
                    b = tl.load(wp + k, mask=ks + k < I, other=0)
                else:
                    a = tl.load(x + xs + k)
                    a2 = a if KIND == DISTANCE else tl.load(x2 + xs + k)
                    b = tl.load(wp + k)
                most = block_max(most, a, a2, b, KIND, False, BK, RM, RN, TM, TN)
            tl.store(keys + tl.cast(unit, tl.int64) * B * O + at, (most >> 15).to(tl.uint16), mask=live)
        first += end - begin


@triton.jit(do_not_specialize=VARYING)
def _select_kernel(keys, chosen, N, units, S: tl.constexpr, R: tl.constexpr):
    """``chosen`` [S, N] int32: the S largest keys, each over its reversed unit; -1 where there are fewer units."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = n < N
    kept = _fill(tl.full((R,), -1, tl.int32), S)
    for unit in range(units):
        key = tl.load(keys + unit * tl.cast(N, tl.int64) + n, mask=live, other=0).to(tl.int32)
        kept = _insert(kept, (key << 15) | (0x7FFF - unit), S)
    for i in tl.static_range(S):
        tl.store(chosen + i * tl.cast(N, tl.int64) + n, kept[i], mask=live)


@triton.jit(do_not_specialize=VARYING)
def _collect_kernel(
    x, x2, w, chosen, values, indices, flags, N, O, I, x_row, w_row,
    KIND: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr,
    PLACES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Candidates of each output, packed into ``values`` (bits, -1 where empty) and ``indices`` [PLACES, N] int32."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = n < N
    slots = tl.arange(0, SLOTS)
    key = tl.load(
        chosen + slots[None, :] * tl.cast(N, tl.int64) + n[:, None], mask=live[:, None] & (slots < S)[None, :], other=-1
    )
    # The K-th key bounds the K-th largest element from below; with fewer than K units everything is a candidate.
    floor = tl.max(tl.where((slots == K - 1)[None, :], key, -1), 1)
    floor = tl.where(floor < 0, 0, floor & -32768)
    reach = (key & -32768) >= floor[:, None]
    use = (key >= 0) & reach
    full = tl.max(tl.where((slots == S - 1)[None, :], use.to(tl.int32), 0), 1)
    unit = 0x7FFF - (key & 0x7FFF)
    ks = tl.arange(0, DEPTH)
    k = unit[:, :, None] * DEPTH + ks[None, None, :]
    inside = use[:, :, None] & (k < I)
    b, o = n // O, n % O
    at_x = b.to(tl.int64)[:, None, None] * x_row + k
    at_w = o.to(tl.int64)[:, None, None] * w_row + k
    a = tl.load(x + at_x, mask=inside, other=0)
    a2 = a if KIND == DISTANCE else tl.load(x2 + at_x, mask=inside, other=0)
    d = difference(a, a2, tl.load(w + at_w, mask=inside, other=0), KIND)
    bits = bits_of(d)
    good = tl.reshape((inside & (bits >= floor[:, None, None])).to(tl.int32), (R, SLOTS * DEPTH))
    rank = tl.cumsum(good, 1)
    count = tl.max(rank, 1)
    place = tl.where(good > 0, rank - 1, PLACES)
    out = place.to(tl.int64) * N + n[:, None]
    kept = place < PLACES
    tl.store(values + out, tl.reshape(bits, (R, SLOTS * DEPTH)), mask=kept)
    tl.store(indices + out, tl.reshape(k, (R, SLOTS * DEPTH)), mask=kept)
    ps = tl.arange(0, PLACES)
    empty = (ps[None, :] >= count[:, None]) & live[:, None]
    tl.store(values + ps[None, :] * tl.cast(N, tl.int64) + n[:, None], -1, mask=empty)
    tl.store(flags + n, ((full > 0) | (count > PLACES)).to(tl.int8), mask=live)


@triton.jit(do_not_specialize=VARYING)
def _finish_kernel(
    values, indices, flags, c, y, index, N, K: tl.constexpr, PLACES: tl.constexpr, INDEX: tl.constexpr, R: tl.constexpr
):
    """Sorts the candidates of unflagged outputs."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = (n < N) & (tl.load(flags + n, mask=n < N, other=1) == 0)
    kept = _fill(tl.full((R,), -1, tl.int64), K)
    for place in tl.static_range(PLACES):
        bits = tl.load(values + place * tl.cast(N, tl.int64) + n, mask=live, other=-1)
        at = tl.load(indices + place * tl.cast(N, tl.int64) + n, mask=live & (bits >= 0), other=0)
        code = tl.where(bits < 0, -1, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64))
        kept = _insert(kept, code, K)
    total = tl.zeros((R,), tl.float32)
    for i in tl.static_range(K):
        total += tl.load(c + i) * (kept[i] >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if INDEX:
            at = 0x7FFFFFFF - (kept[i] & 0x7FFFFFFF).to(tl.int32)
            tl.store(index + n.to(tl.int64) * K + i, at, mask=live)
    tl.store(y + n, total, mask=live)


@triton.jit(do_not_specialize=VARYING)
def _exact_kernel(
    x, x2, w, flags, c, y, index, N, O, I, x_row, w_row,
    KIND: tl.constexpr, K: tl.constexpr, INDEX: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Flagged outputs by K maxima, each below the one before."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = tl.load(flags + n, mask=n < N, other=0) != 0
    if tl.max(live.to(tl.int32), 0) > 0:
        xp = x + (n // O).to(tl.int64)[:, None] * x_row
        x2p = x2 + (n // O).to(tl.int64)[:, None] * x_row
        wp = w + (n % O).to(tl.int64)[:, None] * w_row
        bound = tl.full((R,), 0x7FFFFFFFFFFFFFFF, tl.int64)
        total = tl.zeros((R,), tl.float32)
        for i in range(K):
            best = tl.full((R,), -1, tl.int64)
            for k0 in range(0, I, SPAN):
                k = k0 + tl.arange(0, SPAN)[None, :]
                inside = live[:, None] & (k < I)
                a = tl.load(xp + k, mask=inside, other=0)
                a2 = a if KIND == DISTANCE else tl.load(x2p + k, mask=inside, other=0)
                d = difference(a, a2, tl.load(wp + k, mask=inside, other=0), KIND)
                bits = bits_of(d)
                code = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - k).to(tl.int64)
                best = tl.maximum(best, tl.max(tl.where(inside & (code < bound[:, None]), code, -1), 1))
            total += tl.load(c + i) * (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            if INDEX:
                tl.store(index + n.to(tl.int64) * K + i, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), mask=live)
            bound = best
        tl.store(y + n, total, mask=live)


def top_k(
    x: Tensor, w: Tensor, c: Tensor, with_index: bool, x2: Tensor | None = None, kind: int = 0, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """``sum_k c_k e_(k)`` [B, O] float32 and, if asked for, the credited indices int32 [B, O, K], largest first.

    Equal values are credited by ascending index.
    """
    x, w, x2 = operands(x, w, x2, False)
    c = c.float()
    (B, I), O, K = x.shape, len(w), len(c)
    y = x.new_empty(B, O)
    index = torch.empty((B, O, K) if with_index else (0,), dtype=torch.int32, device=x.device)
    if y.numel() == 0:
        return y, index
    tile = tile or tile_for("keys_shallow" if I <= 2048 else "keys", B, O, I)
    S, units = K + 2, -(-I // tile.depth)
    if units >= 1 << 15:
        raise ValueError(f"order_statistic: expected fewer than {tile.depth << 15} coordinates, got {I}; split them")
    slots, places = triton.next_power_of_2(S), triton.next_power_of_2(K + 4)
    rows = max(1, min(B, _SLAB // O))
    n = rows * O
    keys = torch.empty((units, n), dtype=torch.uint16, device=x.device)
    chosen = torch.empty((S, n), dtype=torch.int32, device=x.device)
    values, indices = torch.empty((2, places, n), dtype=torch.int32, device=x.device)
    flags = torch.empty(n, dtype=torch.int8, device=x.device)
    strides = (x.stride(0), w.stride(0))
    for start in range(0, B, rows):
        part = slice(start, start + rows)
        a, a2, out = x[part], x2[part], y[part]
        at = index[part] if with_index else index
        n = out.numel()
        work = Work.of(tile, len(a), O, I, x.device)
        _keys_kernel[(work.programs,)](
            a, a2, w, keys, len(a), O, I, *strides, *work.split,
            KIND=kind, MASK=I % tile.depth != 0, **options(tile),
        )  # fmt: skip
        _select_kernel[(triton.cdiv(n, 128),)](keys, chosen, n, units, S=S, R=128, num_warps=4)
        r = max(1, 2048 // (slots * tile.depth))
        _collect_kernel[(triton.cdiv(n, r),)](
            a, a2, w, chosen, values, indices, flags, n, O, I, *strides,
            KIND=kind, K=K, S=S, SLOTS=slots, DEPTH=tile.depth, PLACES=places, R=r, num_warps=4,
        )  # fmt: skip
        _finish_kernel[(triton.cdiv(n, 128),)](
            values, indices, flags, c, out, at, n, K=K, PLACES=places, INDEX=with_index, R=128, num_warps=4
        )
        _exact_kernel[(triton.cdiv(n, 16),)](
            a, a2, w, flags, c, out, at, n, O, I, *strides,
            KIND=kind, K=K, INDEX=with_index, R=16, SPAN=64, num_warps=4,
        )  # fmt: skip
    return y, index
