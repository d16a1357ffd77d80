# SPDX-License-Identifier: Apache-2.0
"""The ``k`` largest entries of short rows on a CPU, each with an index of its own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest", "largest_reference"]

_DIGIT = 256  # numbers below it are exact in every dtype that a matrix product may round to


def largest_reference(t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries along the last axis, descending, and their distinct int64 indices.

    The lowest index stands first among equals for ``k = 1``; for more, the order among equals is torch's.
    """
    return t.max(-1, keepdim=True) if k == 1 else t.topk(k, dim=-1, sorted=True)


def largest(t: Tensor, k: int, with_index: bool) -> tuple[Tensor, Tensor | None]:
    """As :func:`largest_reference`, for contiguous ``t`` [..., I] that fits the cache. ``t`` is overwritten.

    For ``k = 1`` the index comes from the one-hot ``t == max``, times the digits of ``0..I-1``: both are vectorised
    where a maximum with index is not. Rows with ties are looked at again. A row with NaN has value NaN and an
    index in range.
    """
    if k > 1:
        value, index = t.topk(k, dim=-1, sorted=True)
        return value, index if with_index else None
    if with_index and t.shape[-1] > _DIGIT * _DIGIT:
        return largest_reference(t, 1)
    value = t.amax(-1, keepdim=True)
    if not with_index:
        return value, None
    places = torch.arange(t.shape[-1], device=t.device)
    digits = torch.stack([torch.ones_like(places), places % _DIGIT, places // _DIGIT], 1).to(t.dtype)
    hits = t.eq_(value).view(-1, t.shape[-1])
    count, low, high = (hits @ digits).unbind(-1)
    index = high.long() * _DIGIT + low.long()
    tied = (count != 1).nonzero()[:, 0]
    if len(tied):
        index[tied] = hits[tied].max(-1)[1]
    return value, index.view(value.shape)
