# SPDX-License-Identifier: Apache-2.0
"""Blocking and gathering shared by the distance operators."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["blocks", "check_operands", "gather_signs"]

_BLOCK_ELEMENTS = 1 << 22  # 16 MiB of float32: stays near the last-level cache of a small CPU


def check_operands(operator: str, x: Tensor, w: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is [B, I], ``w`` is [O, I], of one floating dtype and device."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"{operator}: expected x [B, I] and w [O, I] with I >= 1, got {tuple(x.shape)} and {tuple(w.shape)}"
        )
    if x.dtype != w.dtype or not x.dtype.is_floating_point:
        raise ValueError(f"{operator}: expected one floating dtype, got x {x.dtype} and w {w.dtype}")
    if x.device != w.device:
        raise ValueError(f"{operator}: expected one device, got x on {x.device} and w on {w.device}")


def blocks(x: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(rows, t)`` with ``t = x[rows, None, :] - w`` [b, O, I], so memory stays O(b O I)."""
    step = max(1, _BLOCK_ELEMENTS // max(1, w.numel()))
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(start + step, x.shape[0]))
        yield rows, x[rows, None, :] - w[None]


def gather_signs(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    """``sign(x[b, i] - w[o, i])`` at ``i = index[b, o, k]``: [B, O, K].

    Zero where ``x`` and ``w`` meet, which is a subgradient of ``|x - w|`` there.
    """
    b, o, k = index.shape
    at_x = x.gather(1, index.reshape(b, o * k)).reshape(b, o, k)
    rows = torch.arange(o, device=w.device)[None, :, None]
    return (at_x - w[rows, index]).sign_()
