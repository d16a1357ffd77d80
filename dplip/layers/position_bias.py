# SPDX-License-Identifier: Apache-2.0
"""A learned bias per channel, shared by all positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["PositionBias"]


class PositionBias(LipschitzLayer):
    """``y[b, c, s] = x[b, c, s] + bias[c]`` at each of S positions (S = 1 for [B, C]).

    Shapes: ``x`` [B, channels, *], ``bias`` [channels], ``y`` as ``x``.

    Guarantee. A translation: norm 1 in every norm. One example's gradient sums the cotangent over positions, so its l_2
    norm is at most ``min(||g||_1, sqrt(S) ||g||_2)``; the factor sqrt(S) is reached by a constant cotangent.

    Raises:
        ConfigError: ``channels`` is not positive.
        ValueError: ``forward`` gets anything but [B, channels, *].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise ConfigError(f"PositionBias: expected channels >= 1, got {channels}; fix it")
        self.channels = channels
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"PositionBias: expected x [B, {self.channels}, *], got {tuple(x.shape)}")
        return x + self.bias.view(-1, *[1] * (x.ndim - 2))

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms.uniform(1.0)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        return {"bias": min(g.l1, math.sqrt(math.prod(shapes.input[1:])) * g.l2)}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        return {"bias": g.reshape(len(g), self.channels, math.prod(g.shape[2:])).sum(2)}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    def fan_in(self, shapes: Shapes) -> int:
        return 1

    def extra_repr(self) -> str:
        return f"{self.channels}"
