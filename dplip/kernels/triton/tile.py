# SPDX-License-Identifier: Apache-2.0
r"""Register tiles of ``max_i e(x_bi, w_oi)``, the arithmetic shared by all selection kernels.

A program of ``TM * TN`` threads keeps an accumulator ``[RM, RN, TM, TN]``. Triton spreads threads over the trailing
axes, so each thread owns a whole ``RM x RN`` tile of outputs and every loaded value serves many of them. Operands are
read row-major, ``[BK, RM, TM]`` and ``[BK, RN, TN]`` with ``k`` first: no transposed copy, 16-byte copies to shared
memory, 16-byte reads from it.

Magnitudes are kept as the int32 bits of non-negative floats, which order like the floats, NaN above infinity. Hopper
has a three-input integer maximum that no PTX names; ptxas forms it where two maxima meet in one inline-assembly block
with the accumulator last. Four elements then cost 4 FADD, 2 FMNMX and 1 VIMNMX3.

Programs share work as evenly as it divides: the units (tile, block of ``k``) are numbered and every program takes the
same count (Osama, Merrill, Cecka, Garland, Owens, Stream-K, PPoPP 2023). Two programs may meet in one tile; an integer
atomic maximum is exact in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from dplip.kernels.dispatch import interpreted

__all__ = [
    "DISTANCE",
    "LOWER",
    "UPPER",
    "VARYING",
    "Tile",
    "bits_of",
    "block_max",
    "block_range",
    "difference",
    "farthest",
    "half_max",
    "halves",
    "load_operands",
    "outputs_of",
    "segment",
    "tile_operands",
    "tile_rows",
]

# Inline assembly does not run in the interpreter.
PLAIN = tl.constexpr(interpreted())

# What an element is: |x - w|; or over a box, its least and its largest value.
DISTANCE = tl.constexpr(0)
LOWER = tl.constexpr(1)
UPPER = tl.constexpr(2)


# Sizes that change from call to call without changing the code worth having.
VARYING = ["B", "tiles_m", "units", "share", "total", "zero", "N", "room"]


class Tile(NamedTuple):
    """A launch: registers, threads and ``k`` of a tile, pipeline depth, warps, programs per multiprocessor.

    ``direct``: results leave from the threads that hold them, in short pieces, instead of being laid out anew through
    shared memory for whole cache lines. ``waves``: how often every place of a multiprocessor is filled.
    """

    RM: int
    RN: int
    TM: int
    TN: int
    BK: int
    U: int
    STAGES: int
    warps: int
    per_sm: int
    direct: bool = False
    waves: int = 1

    @property
    def rows(self) -> int:
        """Examples of a tile."""
        return self.RM * self.TM

    @property
    def columns(self) -> int:
        """Neurons of a tile."""
        return self.RN * self.TN

    @property
    def depth(self) -> int:
        """Coordinates of one unit of work."""
        return self.BK * self.U


@triton.jit
def tile_rows(pid, n, R: tl.constexpr, T: tl.constexpr):
    """Indices [R, T] of a tile, and the same kept inside ``n``."""
    rows = pid * (R * T) + tl.arange(0, R)[:, None] * T + tl.arange(0, T)[None, :]
    return rows, tl.minimum(rows, n - 1)


@triton.jit
def segment(first, last, units):
    """Of the units ``first`` to ``last``, those of one tile: the tile, and its units from ``begin`` to ``end``."""
    tile = first // units
    begin = first - tile * units
    return tile, begin, tl.minimum(units, begin + last - first)


@triton.jit
def tile_operands(
    tile, tiles_m, B, O, x_row, w_row, ks,
    RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Of a tile, its examples [RM, TM] and neurons [RN, TN], and the offsets [BK, ., .] of their coordinates ``ks``.

    Tiles that share weights are neighbours.
    """
    rm, rm_in = tile_rows(tile % tiles_m, B, RM, TM)
    rn, rn_in = tile_rows(tile // tiles_m, O, RN, TN)
    return rm, rn, rm_in.to(tl.int64)[None] * x_row + ks, rn_in.to(tl.int64)[None] * w_row + ks


@triton.jit
def load_operands(x_at, x2_at, w_at, ks, k, end, KIND: tl.constexpr, MASK: tl.constexpr):
    """``x``, ``x2`` (``x`` again for a distance) and ``w``, ``k`` coordinates on from ``ks`` [BK, 1, 1], where the
    pointers stand; with ``MASK`` 0 from ``end`` on."""
    if MASK:
        a = tl.load(x_at + k, mask=ks + k < end, other=0)
        a2 = a if KIND == DISTANCE else tl.load(x2_at + k, mask=ks + k < end, other=0)
        b = tl.load(w_at + k, mask=ks + k < end, other=0)
    else:
        a = tl.load(x_at + k)
        a2 = a if KIND == DISTANCE else tl.load(x2_at + k)
        b = tl.load(w_at + k)
    return a, a2, b


@triton.jit
def outputs_of(
    tile,
    tiles_m,
    O,
    zero,
    DIRECT: tl.constexpr,
    RM: tl.constexpr,
    RN: tl.constexpr,
    TM: tl.constexpr,
    TN: tl.constexpr,
):
    """Offsets [RM, RN, TM, TN] of a tile's outputs in an array of rows of ``O`` entries, less than 2^31 in all.

    Not int64: pairs of registers for every output would halve the programs per multiprocessor. ``zero`` is 0, which the
    compiler cannot know: ``DIRECT`` hides behind it that offsets are contiguous, or else the store would be laid out
    anew.
    """
    m = (tile % tiles_m) * (RM * TM) + tl.arange(0, RM)[:, None] * TM + tl.arange(0, TM)[None, :]
    n = tl.arange(0, TN) ^ zero if DIRECT else tl.arange(0, TN)
    n = (tile // tiles_m) * (RN * TN) + n[None, :] + tl.arange(0, RN)[:, None] * TN
    return m[:, None, :, None] * O + n[None, :, None, :]


@triton.jit
def halves(v, N: tl.constexpr):
    """[N, P, Q] -> its two halves along the first axis."""
    s: tl.constexpr = v.shape
    return tl.split(tl.permute(tl.reshape(v, (2, N // 2, s[1], s[2])), (1, 2, 3, 0)))


@triton.jit
def bits_of(v):
    """int32 bits of a float32 that is not negative; every NaN becomes the positive one."""
    return tl.where(v == v, v, float("nan")).to(tl.int32, bitcast=True)


@triton.jit
def difference(x, x2, w, KIND: tl.constexpr):
    """The element itself, float32: ``|x - w|``, or its least or largest value over ``x <= . <= x2``."""
    if KIND == DISTANCE:
        return tl.abs(x - w)
    elif KIND == LOWER:
        d = tl.maximum(x - w, w - x2, propagate_nan=tl.PropagateNan.ALL)
        return tl.maximum(d, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.maximum(tl.abs(x - w), tl.abs(x2 - w), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _four_distances(a0, b0, a1, b1, a2, b2, a3, b3, acc):
    return tl.inline_asm_elementwise(
        """{.reg .f32 t,u,v,z; .reg .b32 p,q;
        sub.rn.f32 t, $1, $2; abs.f32 t, t; sub.rn.f32 u, $3, $4; abs.f32 u, u; max.NaN.f32 t, t, u;
        sub.rn.f32 v, $5, $6; abs.f32 v, v; sub.rn.f32 z, $7, $8; abs.f32 z, z; max.NaN.f32 v, v, z;
        mov.b32 p, t; mov.b32 q, v; max.s32 p, p, q; max.s32 $0, p, $9;}""",
        "=r,f,f,f,f,f,f,f,f,r",
        [a0, b0, a1, b1, a2, b2, a3, b3, acc],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _two_half_distances(a0, b0, a1, b1, acc):
    return tl.inline_asm_elementwise(
        """{.reg .b32 t,u; sub.rn.f16x2 t, $1, $2; abs.f16x2 t, t; sub.rn.f16x2 u, $3, $4; abs.f16x2 u, u;
        max.NaN.f16x2 t, t, u; max.NaN.f16x2 $0, t, $5;}""",
        "=r,r,r,r,r,r",
        [a0, b0, a1, b1, acc],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _lower_step(l, u, w, acc):
    # Of an integer maximum only the positive values survive an accumulator that starts at 0.
    return tl.inline_asm_elementwise(
        """{.reg .f32 d,e; .reg .b32 p,q; sub.rn.f32 d, $1, $3; sub.rn.f32 e, $3, $2;
        mov.b32 p, d; mov.b32 q, e; max.s32 p, p, q; max.s32 $0, p, $4;}""",
        "=r,f,f,f,r",
        [l, u, w, acc],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _upper_step(l, u, w, acc):
    return tl.inline_asm_elementwise(
        """{.reg .f32 d,e; .reg .b32 p; sub.rn.f32 d, $1, $3; sub.rn.f32 e, $2, $3; abs.f32 d, d; abs.f32 e, e;
        max.NaN.f32 d, d, e; mov.b32 p, d; max.s32 $0, p, $4;}""",
        "=r,f,f,f,r",
        [l, u, w, acc],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _both_step(l, u, w, least, most):
    # Where l <= u, the farther end is the negative one of l - w and w - u of largest magnitude: unsigned, the largest.
    return tl.inline_asm_elementwise(
        """{.reg .f32 d,e; .reg .b32 p,q,t; sub.rn.f32 d, $2, $4; sub.rn.f32 e, $4, $3; mov.b32 p, d; mov.b32 q, e;
        max.s32 t, p, q; max.s32 $0, t, $5; max.u32 t, p, q; max.u32 $1, t, $6;}""",
        "=&r,=r,f,f,f,r,r",
        [l, u, w, least, most],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _unpack(v):
    """Both float16 halves of an int32."""
    low, high = (v & 0xFFFF).to(tl.uint16), ((v >> 16) & 0xFFFF).to(tl.uint16)
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@triton.jit
def half_max(acc):
    """float32 bits of the larger half of every int32."""
    low, high = _unpack(acc)
    return bits_of(tl.maximum(low.to(tl.float32), high.to(tl.float32), propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _plain_step(acc, a, a2, b, KIND: tl.constexpr, HALF: tl.constexpr):
    """The same on [1, RM, 1, TM, 1]-like operands by ordinary operations."""
    if HALF:
        al, ah = _unpack(a)
        bl, bh = _unpack(b)
        cl, ch = _unpack(acc)
        low = tl.maximum(cl, tl.abs(al - bl), propagate_nan=tl.PropagateNan.ALL).to(tl.uint16, bitcast=True)
        high = tl.maximum(ch, tl.abs(ah - bh), propagate_nan=tl.PropagateNan.ALL).to(tl.uint16, bitcast=True)
        return low.to(tl.int32) | (high.to(tl.int32) << 16)
    else:
        return tl.maximum(acc, bits_of(difference(a, a2, b, KIND)))


@triton.jit
def block_max(
    acc, a, a2, b, KIND: tl.constexpr, HALF: tl.constexpr, BK: tl.constexpr,
    RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """``max(acc, max_k e)``: ``a``, ``a2`` [BK, RM, TM] and ``b`` [BK, RN, TN] into int32 bits [RM, RN, TM, TN].

    ``HALF``: int32 pairs of float16 instead, and pairs of maxima in ``acc``.
    """
    if BK == 1:
        p = tl.reshape(a, (RM, 1, TM, 1))
        p2 = tl.reshape(a2, (RM, 1, TM, 1))
        q = tl.reshape(b, (1, RN, 1, TN))
        if PLAIN:
            return _plain_step(acc, p, p2, q, KIND, HALF)
        elif KIND == LOWER:
            return _lower_step(p, p2, q, acc)
        else:
            return _upper_step(p, p2, q, acc)
    elif BK == 2 and HALF and not PLAIN:
        a0, a1 = halves(a, 2)
        b0, b1 = halves(b, 2)
        return _two_half_distances(
            tl.reshape(a0, (RM, 1, TM, 1)), tl.reshape(b0, (1, RN, 1, TN)),
            tl.reshape(a1, (RM, 1, TM, 1)), tl.reshape(b1, (1, RN, 1, TN)), acc,
        )  # fmt: skip
    elif BK == 4 and KIND == DISTANCE and not HALF and not PLAIN:
        p, q = halves(a, 4)
        a0, a1 = halves(p, 2)
        a2_, a3 = halves(q, 2)
        p, q = halves(b, 4)
        b0, b1 = halves(p, 2)
        b2, b3 = halves(q, 2)
        return _four_distances(
            tl.reshape(a0, (RM, 1, TM, 1)), tl.reshape(b0, (1, RN, 1, TN)),
            tl.reshape(a1, (RM, 1, TM, 1)), tl.reshape(b1, (1, RN, 1, TN)),
            tl.reshape(a2_, (RM, 1, TM, 1)), tl.reshape(b2, (1, RN, 1, TN)),
            tl.reshape(a3, (RM, 1, TM, 1)), tl.reshape(b3, (1, RN, 1, TN)), acc,
        )  # fmt: skip
    else:
        a0, a1 = halves(a, BK)
        b0, b1 = halves(b, BK)
        if KIND == DISTANCE:
            acc = block_max(acc, a0, a0, b0, KIND, HALF, BK // 2, RM, RN, TM, TN)
            return block_max(acc, a1, a1, b1, KIND, HALF, BK // 2, RM, RN, TM, TN)
        else:
            l0, l1 = halves(a2, BK)
            acc = block_max(acc, a0, l0, b0, KIND, HALF, BK // 2, RM, RN, TM, TN)
            return block_max(acc, a1, l1, b1, KIND, HALF, BK // 2, RM, RN, TM, TN)


@triton.jit
def block_range(
    least, most, a, a2, b, BK: tl.constexpr, RM: tl.constexpr, RN: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr
):
    """Both ends at once, for ``a <= a2``; :func:`farthest` turns ``most`` into float bits at the end."""
    if BK == 1:
        l, u = tl.reshape(a, (RM, 1, TM, 1)), tl.reshape(a2, (RM, 1, TM, 1))
        w = tl.reshape(b, (1, RN, 1, TN))
        if PLAIN:
            least = tl.maximum(least, bits_of(difference(l, u, w, LOWER)))
            return least, tl.maximum(most, bits_of(difference(l, u, w, UPPER)))
        else:
            return _both_step(l, u, w, least, most)
    else:
        l0, l1 = halves(a, BK)
        u0, u1 = halves(a2, BK)
        w0, w1 = halves(b, BK)
        least, most = block_range(least, most, l0, u0, w0, BK // 2, RM, RN, TM, TN)
        return block_range(least, most, l1, u1, w1, BK // 2, RM, RN, TM, TN)


@triton.jit
def farthest(least, most):
    """float32 of the larger end of :func:`block_range`; NaN wherever the other end is."""
    bits = most if PLAIN else tl.where(most < 0, most & 0x7FFFFFFF, 0)
    return tl.where(least > 0x7F800000, least, bits).to(tl.float32, bitcast=True)
