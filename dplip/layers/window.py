# SPDX-License-Identifier: Apache-2.0
"""Sliding windows over images: how many there are, how they overlap, and their contents as rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from dplip.errors import ConfigError

__all__ = ["Pair", "Window", "pair"]

Pair = tuple[int, int]


def pair(value: int | Sequence[int]) -> Pair:
    """``(value, value)`` for a number."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@dataclass(frozen=True)
class Window:
    """Windows ``{j s - p + t e : 0 <= t < k}`` for ``j = 0, 1, ...`` along each of two axes.

    Counts are exact for the size at hand, borders included, so they are never above the usual ``k`` and ``ceil(k/s)``.

    Args:
        kernel: taps ``k`` per axis.
        stride: ``s``.
        padding: ``p`` entries added on both sides.
        dilation: ``e``, distance of neighbouring taps.

    Raises:
        ConfigError: a number is out of range.
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def __post_init__(self) -> None:
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise ConfigError(
                f"window: expected positive sizes (kernel, stride, dilation) and padding >= 0, got {self}; fix them"
            )

    def require_half_padding(self) -> None:
        """Raise :class:`ConfigError` where the padding is more than half a window, which may then be all padding."""
        if any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise ConfigError(f"window: expected padding of at most half the window, got {self}; lower it")

    def positions(self, size: Pair) -> Pair:
        """Number of windows along each axis of an image of ``size`` (H, W).

        Raises:
            ValueError: the image is smaller than one window.
        """
        found = tuple(
            (n + 2 * p - (k - 1) * e - 1) // s + 1
            for n, k, s, p, e in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        if min(found) < 1:
            raise ValueError(f"window: expected an image as large as the window, got {tuple(size)} for {self}")
        return found[0], found[1]

    def overlap(self, size: Pair) -> int:
        """The most windows that contain one entry of the image."""
        return prod(_most(self, i, tuple(size), of_entries=True) for i in (0, 1))

    def taps(self, size: Pair) -> int:
        """The most entries of the image (padding excluded) that one window contains."""
        return prod(_most(self, i, tuple(size), of_entries=False) for i in (0, 1))

    def unfold(self, x: Tensor) -> Tensor:
        """Zero-padded windows of ``x`` [B, C, H, W] as columns: [B, C kh kw, S], channels first, row-major windows."""
        return F.unfold(x, self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride)

    def entries(self, x: Tensor) -> Tensor:
        """The same windows tap by tap: [kh kw, B, C, H', W'], row-major taps, so that a reduction over them is fast."""
        rows, columns = self.positions((x.shape[2], x.shape[3]))
        (down, right), (sh, sw), (eh, ew) = self.padding, self.stride, self.dilation
        if down or right:
            x = F.pad(x, (right, right, down, down))
        ends = (rows - 1) * sh + 1, (columns - 1) * sw + 1
        starts = [(i * eh, j * ew) for i in range(self.kernel[0]) for j in range(self.kernel[1])]
        return torch.stack([x[:, :, i : i + ends[0] : sh, j : j + ends[1] : sw] for i, j in starts])

    def __str__(self) -> str:
        shown = [f"kernel={self.kernel}", f"stride={self.stride}"]
        shown += [f"padding={self.padding}"] * (self.padding != (0, 0))
        shown += [f"dilation={self.dilation}"] * (self.dilation != (1, 1))
        return ", ".join(shown)


@lru_cache(maxsize=4096)
def _most(window: Window, axis: int, size: tuple[int, ...], *, of_entries: bool) -> int:
    """Along one axis, the most windows that contain one entry, or the most entries that one window contains."""
    k, s, p, e = (v[axis] for v in (window.kernel, window.stride, window.padding, window.dilation))
    number = torch.arange(window.positions((size[0], size[1]))[axis])[:, None].expand(-1, k)
    entry = number * s - p + torch.arange(k) * e
    inside = (entry >= 0) & (entry < size[axis])
    counts = torch.bincount((entry if of_entries else number)[inside], minlength=1)
    return int(counts.max())
