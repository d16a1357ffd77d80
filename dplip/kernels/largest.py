# SPDX-License-Identifier: Apache-2.0
"""The ``k`` largest entries of short rows on a CPU, each with an index of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["largest", "largest_reference"]

_EXACT = 1 << 24  # float32 holds every whole number up to it
_PARTIAL = 64  # torch sorts rows of 64 k and more in part, shorter ones by another and slower way


def largest_reference(t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries along the last axis, descending, and their distinct int64 indices.

    The lowest index stands first among equals for ``k = 1``; for more, the order among equals is torch's.
    """
    return t.max(-1, keepdim=True) if k == 1 else t.topk(k, dim=-1, sorted=True)


def largest(t: Tensor, k: int, with_index: bool) -> tuple[Tensor, Tensor | None]:
    """As :func:`largest_reference`, for ``t`` [..., I] that fits the cache and is overwritten.

    For ``k = 1`` the index comes from the largest of ``(t == max) (I - i)``: three passes, all vectorised where a
    maximum with index is not. A row with NaN has value NaN and an index in range.
    """
    length = t.shape[-1]
    if k > 1:
        if length < _PARTIAL * k <= 2 * length:
            t = F.pad(t, (0, _PARTIAL * k - length), value=-torch.inf)
        value, index = t.topk(k, dim=-1, sorted=True)
        return value, index if with_index else None
    if with_index and length > _EXACT:
        return largest_reference(t, 1)
    value = t.amax(-1, keepdim=True)
    if not with_index:
        return value, None
    countdown = torch.arange(length, 0, -1, dtype=t.dtype, device=t.device)
    first = t.eq_(value).mul_(countdown).amax(-1, keepdim=True)
    return value, (length - first.long()).clamp_max_(length - 1)
