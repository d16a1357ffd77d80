# SPDX-License-Identifier: Apache-2.0
"""Convolutions without a constraint: bounds of whatever the weight is."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from dplip.conv_norm import conv_norms
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.layers.snapshot import Snapshot
from dplip.layers.window import Pair, Window
from dplip.norms import Norms, OperatorNorms

__all__ = ["AffineConv2d"]


class AffineConv2d(LipschitzLayer):
    r"""``y = conv2d(x, W) + b`` with zero padding; ``x`` [B, C, H, W], ``weight`` [m, C / groups, kh, kw], ``y``
    [B, m, H', W'].

    Guarantee. Operator norms are those of the current weight at the current size (:mod:`dplip.conv_norm`). Let an
    entry of the image lie in at most ``v`` windows and a window contain at most ``n`` entries (both exact for the
    size, borders included), of which there are ``S``. With windows ``P``, ``dL/dW = G P^T``, so one example has
    ``||dL/dW||_F <= min(sqrt(v) ||g||_2 ||x||_2, min(||g||_1, sqrt(S) ||g||_2) A)``, ``A = min(||x||_2, sqrt(n)
    ||x||_inf)``, and ``||dL/db||_2 <= min(||g||_1, sqrt(S) ||g||_2)``: the input must be bounded.

    Args:
        weight: a parameter, shared with whoever owns it.
        bias: a parameter [m], or None.
        window: geometry.
        groups: filters of group ``i`` see the channels of group ``i`` only.

    Raises:
        ValueError: ``forward`` gets anything but [B, C, H, W] with at least one window.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, window: Window, groups: int = 1) -> None:
        super().__init__()
        self.weight, self.bias, self.window, self.groups = weight, bias, window, groups
        self._norms: tuple[Snapshot, Pair, OperatorNorms] | None = None

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        w = self.window
        return F.conv2d(x, weight, bias, w.stride, w.padding, w.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"{type(self).__name__}: expected x [B, {self.in_channels}, H, W], got {tuple(x.shape)}")
        self.window.positions((x.shape[2], x.shape[3]))
        return self._convolve(x, self.weight, self.bias)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        w, size = self.weight.detach(), (shapes.input[1], shapes.input[2])
        if self._norms is not None:
            seen, at, norms = self._norms
            if at == size and seen.holds(w):
                return norms
        geometry = self.window
        norms = conv_norms(
            w,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=self.groups,
            size=size,
            overlap=geometry.overlap(size),
        )
        self._norms = (Snapshot(w), size, norms)
        return norms

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        size = (shapes.input[1], shapes.input[2])
        shared = min(g.l1, math.sqrt(math.prod(self.window.positions(size))) * g.l2)
        entries = self.window.taps(size) * self.weight.shape[1]
        patch = min(x.l2, math.sqrt(entries) * x.linf)
        spread = math.sqrt(self.window.overlap(size)) * g.l2
        bounds = {"weight": 0.0 if g.l2 == 0 or x.l2 == 0 else min(spread * x.l2, shared * patch)}
        return bounds if self.bias is None else bounds | {"bias": shared}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        windows = self.window.unfold(x).unflatten(1, (self.groups, self.weight[0].numel()))  # [B, groups, d, S]
        of_filters = g.flatten(2).unflatten(1, (self.groups, len(self.weight) // self.groups))
        grads = {"weight": (of_filters @ windows.mT).reshape(len(x), *self.weight.shape)}
        return grads if self.bias is None else grads | {"bias": g.sum((2, 3))}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        centre = self._convolve((lower + upper) / 2, self.weight, self.bias)
        radius = self._convolve((upper - lower) / 2, self.weight.abs(), None)
        return centre - radius, centre + radius

    def fan_in(self, shapes: Shapes) -> int:
        return self.weight[0].numel() + 1

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_channels}, {len(self.weight)}, {self.window}, groups={self.groups}, bias={bias}"
