# SPDX-License-Identifier: Apache-2.0
r"""GroupSort: pairs by comparison, larger groups by sorting 64-bit keys, the value's order above the channel's place.

Keys are distinct, so the order is that of a stable sort and the places are a permutation. Groups of more than 1024
channels take the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dplip.kernels import group_sort as operator

__all__ = ["backward", "forward"]

_BLOCK = 1024  # elements of one program
_LARGEST = 1024  # channels of the largest group that is sorted here
_PLACES = tl.constexpr(32)


@triton.jit
def _key(v):
    """int32 in the order of float32 ``v``: -0 and 0 alike, NaN of either sign last."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(v != v, 0x7FFFFFFF, bits)


@triton.jit
def _group_sort_pair_kernel(x, y, index, N, S, INDEX: tl.constexpr, R: tl.constexpr):
    """Pairs of channels ``S`` elements apart; ``N`` pairs."""
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = n < N
    at = n // S * 2 * S + n % S
    a = tl.load(x + at, mask=live, other=0).to(tl.float32)
    b = tl.load(x + at + S, mask=live, other=0).to(tl.float32)
    missing = (a != a) | (b != b)
    nan = tl.where(a != a, a, b)
    swapped = a > b
    low = tl.where(missing, nan, tl.where(swapped, b, a))
    high = tl.where(missing, nan, tl.where(swapped, a, b))
    tl.store(y + at, low.to(y.dtype.element_ty), mask=live)
    tl.store(y + at + S, high.to(y.dtype.element_ty), mask=live)
    if INDEX:
        tl.store(index + at, swapped.to(tl.int32), mask=live)
        tl.store(index + at + S, 1 - swapped.to(tl.int32), mask=live)


@triton.jit
def _group_sort_forward_kernel(x, y, index, N, S, G, INDEX: tl.constexpr, GB: tl.constexpr, R: tl.constexpr):
    """``N`` groups of ``G`` channels, ``GB`` the next power of two."""
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    place = tl.arange(0, GB)
    base = (n // S * G * S + n % S)[:, None]
    live = (n < N)[:, None] & (place < G)[None, :]
    v = tl.load(x + base + place[None, :].to(tl.int64) * S, mask=live, other=0).to(tl.float32)
    # Padding goes to the end, after every NaN.
    high = tl.where(live, _key(v), 0x7FFFFFFF).to(tl.int64)
    order = tl.sort((high << _PLACES) | place[None, :].to(tl.int64), 1)
    came_from = order & 0x7FFFFFFF
    target = base + place[None, :].to(tl.int64) * S
    tl.store(y + target, tl.load(x + base + came_from * S, mask=live, other=0), mask=live)
    if INDEX:
        tl.store(index + target, came_from.to(tl.int32), mask=live)


@triton.jit
def _group_sort_backward_kernel(dy, index, dx, N, S, G, R: tl.constexpr):
    """``dx[g G + index] = dy`` for each of ``N`` elements."""
    n = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = n < N
    group = n // (S * G)
    to = group * S * G + tl.load(index + n, mask=live, other=0).to(tl.int64) * S + n % S
    tl.store(dx + to, tl.load(dy + n, mask=live, other=0), mask=live)


def forward(x: Tensor, size: int, with_index: bool) -> tuple[Tensor, Tensor]:
    """Sorted ``x`` [B, C, S] and the places int32, or [0]."""
    if size > _LARGEST:
        return operator.group_sort_reference(x, size, with_index)
    x = x.contiguous()
    y = torch.empty_like(x)
    index = torch.empty(x.shape if with_index else (0,), dtype=torch.int32, device=x.device)
    groups = x.numel() // size
    if groups == 0:
        return y, index
    if size == 2:
        _group_sort_pair_kernel[(triton.cdiv(groups, _BLOCK),)](
            x, y, index, groups, x.shape[2], INDEX=with_index, R=_BLOCK, num_warps=4
        )
    else:
        block = triton.next_power_of_2(size)
        rows = max(1, _BLOCK // block)
        _group_sort_forward_kernel[(triton.cdiv(groups, rows),)](
            x, y, index, groups, x.shape[2], size, INDEX=with_index, GB=block, R=rows, num_warps=4
        )
    return y, index


def backward(dy: Tensor, index: Tensor, size: int) -> Tensor:
    """``dx`` [B, C, S]."""
    dy, index = dy.contiguous(), index.contiguous()
    dx = torch.empty_like(dy)
    n = dy.numel()
    if n:
        _group_sort_backward_kernel[(triton.cdiv(n, _BLOCK),)](
            dy, index, dx, n, dy.shape[2], size, R=_BLOCK, num_warps=4
        )
    return dx
