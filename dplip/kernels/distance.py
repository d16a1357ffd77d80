# SPDX-License-Identifier: Apache-2.0
"""Checks, blocking and gathering shared by the distance operators."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["blocks", "check_box", "check_operands", "gather_differences", "row_blocks", "tiles", "wide"]

_BLOCK_ELEMENTS = 1 << 22  # 16 MiB of float32: stays near the last-level cache of a small CPU
_TILE_ELEMENTS = 1 << 18  # of each thread: 1 MiB of float32 stays in a core's own cache


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


def check_box(operator: str, lower: Tensor, upper: Tensor, w: Tensor) -> None:
    """Raise ``ValueError`` unless ``lower`` and ``upper`` have one shape, and both are operands next to ``w``."""
    check_operands(operator, lower, w)
    check_operands(operator, upper, w)
    if lower.shape != upper.shape:
        raise ValueError(
            f"{operator}: expected one shape, got lower {tuple(lower.shape)} and upper {tuple(upper.shape)}"
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a distance operator's results: float32 for float16 and bfloat16 operands, else their own."""
    return torch.promote_types(dtype, torch.float32)


def row_blocks(rows: int, row_elements: int, elements: int) -> Iterator[slice]:
    """Slices of ``range(rows)`` of at most ``elements`` elements, or of one row."""
    step = max(1, elements // max(1, row_elements))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def blocks(x: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``(rows, t)`` with ``t = x[rows, None, :] - w`` [b, O, I], so memory stays O(b O I)."""
    for rows in row_blocks(len(x), w.numel(), _BLOCK_ELEMENTS):
        yield rows, x[rows, None, :] - w[None]


def tiles(x: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """As :func:`blocks`, in one buffer of the size of the cores' caches: ``t`` is overwritten by the next one."""
    elements = _TILE_ELEMENTS * torch.get_num_threads()
    buffer = x.new_empty(min(len(x), max(1, elements // max(1, w.numel()))), *w.shape)
    for rows in row_blocks(len(x), w.numel(), elements):
        yield rows, torch.sub(x[rows, None, :], w, out=buffer[: rows.stop - rows.start])


def gather_differences(x: Tensor, w: Tensor, index: Tensor) -> Tensor:
    """``x[b, i] - w[o, i]`` at ``i = index[b, o, k]``: [B, O, K]."""
    rows = torch.arange(len(w), device=w.device)[None, :, None]
    return x.gather(1, index.flatten(1)).reshape(index.shape) - w[rows, index]
