# SPDX-License-Identifier: Apache-2.0
"""Distance neurons that slide over an image, whatever their distance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dplip.errors import ConfigError
from dplip.layers.base import Shapes
from dplip.layers.distance import DistanceLayer
from dplip.layers.window import Pair, Window, pair
from dplip.norms import Norms, OperatorNorms

__all__ = ["DistanceConv2d"]

_GRAD_ELEMENTS = 1 << 22  # per-position gradients formed at a time by per_sample_grad


class DistanceConv2d(DistanceLayer):
    r"""``y[o, s] = d(P_s x, w_o) + b_o`` with ``P_s x`` the window at position ``s`` of the zero-padded image.

    Mixed in front of a dense distance layer, whose distance it applies to windows. Shapes: ``x`` [B, C, H, W], ``y``
    [B, m, H', W'], ``weight`` [m, d] with ``d = (C / groups) kh kw``: row ``o`` is filter ``o``, flattened from
    [C / groups, kh, kw]. A padded entry takes part in the distance as the constant 0.

    Guarantee. Let rows of ``d`` have norms at most ``(k1, k2, kinf)``, let an image's entry lie in at most ``v``
    windows (exact for the size at hand, at most ``ceil(k/s)^2``) and be seen by ``n = v m / groups`` outputs; ``S``
    windows. Then ``||J|| <= (k1, k2, sqrt(n) k2, n kinf, kinf)``, since ``sum_rows <r, x>^2 <= k2^2 sum_windows ||P_s
    x||^2``; padding only shortens rows. One example has ``dL/dw_o = -sum_s g[o, s] r[o, s]``, so ``||dL/dW||_F <= k2
    min(||g||_1, sqrt(S) ||g||_2)`` and ``||dL/db||_2 <= min(||g||_1, sqrt(S) ||g||_2)``, for any input and any
    weights.

    Args:
        in_channels: ``C``.
        out_channels: ``m``.
        kernel_size, stride, padding, dilation: numbers or pairs.
        groups: filters ``o`` of group ``i`` see the channels of group ``i`` only.
        options: of the dense layer.

    Raises:
        ConfigError: a number is out of range or ``groups`` does not divide both channel counts.
        ValueError: ``forward`` gets anything but [B, in_channels, H, W] with at least one window.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        **options: Any,
    ) -> None:
        where = type(self).__name__
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise ConfigError(
                f"{where}: expected positive channels divisible by groups, got {in_channels}, {out_channels} and "
                f"{groups}; change them"
            )
        window = Window(pair(kernel_size), pair(stride), pair(padding), pair(dilation))
        super().__init__(in_channels // groups * math.prod(window.kernel), out_channels, **options)
        self.in_channels, self.out_channels, self.groups, self.window = in_channels, out_channels, groups, window

    def _windows(self, x: Tensor) -> Tensor:
        """The windows of each group as rows: [groups, B S, d]."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{type(self).__name__}: expected x [B, {self.in_channels}, H, W], got {tuple(x.shape)}")
        columns = self.window.unfold(x).unflatten(1, (self.groups, self.in_features))
        return columns.permute(1, 0, 3, 2).flatten(1, 2)

    def _images(self, rows: list[Tensor], size: tuple[int, ...]) -> Tensor:
        """[B S, m / groups] per group -> [B, m, H', W']."""
        h, w = self.window.positions((size[0], size[1]))
        joined = torch.cat(rows, 1).unflatten(0, (len(rows[0]) // (h * w), h, w))
        return joined.permute(0, 3, 1, 2).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        rows = zip(self._windows(self._operand(x)), self.weight.chunk(self.groups), strict=True)
        y = self._images([self.distance(r, w) for r, w in rows], x.shape[2:])
        return y if self.bias is None else y + self.bias[:, None, None]

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        k, n = self.row_norms(), self.window.overlap(_size(shapes)) * self.out_channels // self.groups
        return OperatorNorms(k.l1, k.l2, math.sqrt(n) * k.l2, n * k.linf, k.linf)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        shared = min(g.l1, math.sqrt(math.prod(self.window.positions(_size(shapes)))) * g.l2)
        bounds = {"weight": self.row_norms().l2 * shared}
        return bounds if self.bias is None else bounds | {"bias": shared}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        positions = math.prod(g.shape[2:])
        cotangents = g.flatten(2).transpose(1, 2).unflatten(2, (self.groups, -1))
        step = max(1, _GRAD_ELEMENTS // max(1, positions * self.weight.numel() // self.groups))
        parts = [x.new_zeros(0, *self.weight.shape)]
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            windows, of_part = self._windows(x[part]), cotangents[part].flatten(0, 1)
            groups = [
                self.per_sample_weight_grad(windows[i], w, of_part[:, i]).unflatten(0, (-1, positions)).sum(1)
                for i, w in enumerate(self.weight.chunk(self.groups))
            ]
            parts.append(torch.cat(groups, 1))
        grads = {"weight": torch.cat(parts)}
        return grads if self.bias is None else grads | {"bias": g.sum((2, 3))}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        triples = zip(self._windows(lower), self._windows(upper), self.weight.chunk(self.groups), strict=True)
        ends = [self.distance_interval(low, high, w) for low, high, w in triples]
        low, high = (self._images([end[i] for end in ends], lower.shape[2:]) for i in (0, 1))
        return (low, high) if self.bias is None else (low + self.bias[:, None, None], high + self.bias[:, None, None])

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_channels}, {self.out_channels}, {self.window}, groups={self.groups}, bias={bias}"


def _size(shapes: Shapes) -> Pair:
    return shapes.input[1], shapes.input[2]
