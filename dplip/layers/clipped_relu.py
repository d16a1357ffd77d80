# SPDX-License-Identifier: Apache-2.0
"""A ReLU that saturates at a learned threshold, so that neurons are constant on both sides."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms
from dplip.operator_norm import round_up

__all__ = ["ClippedReLU"]


class ClippedReLU(LipschitzLayer):
    """``y = min(max(x, 0), theta)`` with a learned ``theta >= 0`` per channel or per entry.

    Shapes: ``x`` [B, C, *]; ``theta`` is [C], shared by the positions of a channel, or one example's shape [C, *].

    Guarantee. Slopes lie in [0, 1]: norm 1 in every norm; constant for ``x <= 0`` and for ``x >= theta``. The output
    lies in [min(theta, 0), theta], whatever the input. One example's gradient in ``theta`` is the cotangent where the
    neuron saturates: its l_2 norm is at most ``||g||_2`` per entry and ``min(||g||_1, sqrt(S) ||g||_2)`` per channel of
    S positions. :meth:`project_` keeps ``theta >= 0``; the bounds hold for any ``theta``.

    Source: Huang, Zhang, Shi, Kolter, Anandkumar, Training Certifiably Robust Neural Networks with Efficient Local
    Lipschitz Bounds, NeurIPS 2021, section 4.2.

    Args:
        shape: ``C`` for one threshold per channel, or one example's shape for one per entry.
        initial: every threshold's first value.

    Raises:
        ConfigError: a size is not positive, or ``initial`` is negative or not finite.
        ValueError: ``forward`` gets another shape.
    """

    def __init__(self, shape: int | tuple[int, ...], initial: float = 1.0) -> None:
        super().__init__()
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        if not size or min(size) < 1 or not 0 <= initial < math.inf:
            raise ConfigError(
                f"ClippedReLU: expected positive sizes and a finite initial >= 0, got {shape} and {initial}; fix them"
            )
        self.theta = nn.Parameter(torch.full(size, float(initial)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), self._thresholds(x))

    def _thresholds(self, x: Tensor) -> Tensor:
        size = self.theta.shape
        if x.ndim < 2 or x.shape[1 : 1 + len(size)] != size or (len(size) > 1 and x.ndim != 1 + len(size)):
            raise ValueError(f"ClippedReLU: expected x [B, {', '.join(map(str, size))}, *], got {tuple(x.shape)}")
        return self.theta.view(*size, *[1] * (x.ndim - 1 - len(size)))

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms.uniform(1.0)

    def _box(self, size: Tensor, shapes: Shapes) -> Norms:
        """Norms of a vector whose entries are bounded by ``size``, one per threshold."""
        s = size.detach().double().abs()
        repeats, n = shapes.out_dim // s.numel(), shapes.out_dim
        if not bool(torch.isfinite(s).all()):
            return Norms(n)
        largest = float(s.amax())
        l1 = round_up(float(s.sum()) * repeats, n)
        l2 = round_up(largest * math.sqrt(float((s / (largest or 1.0)).square().sum()) * repeats), n)
        return Norms(n, l1, l2, largest)

    def range_bound(self, shapes: Shapes) -> Norms | None:
        return self._box(self.theta, shapes)

    def output_bound(self, x: Norms, shapes: Shapes) -> Norms:
        return super().output_bound(x, shapes).meet(self._box(self.theta.clamp_min(0), shapes))

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        positions = shapes.out_dim // self.theta.numel()
        return {"theta": min(g.l1, math.sqrt(positions) * g.l2)}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        theta, rectified = self._thresholds(x).detach(), torch.relu(x)
        share = (rectified > theta).to(g.dtype) + 0.5 * (rectified == theta).to(g.dtype)  # ties: half, as torch.minimum
        return {"theta": (g * share).reshape(len(g), *self.theta.shape, -1).sum(-1) if len(g) else self._no_grad(g)}

    def _no_grad(self, g: Tensor) -> Tensor:
        return g.new_zeros(0, *self.theta.shape)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    @torch.no_grad()
    def project_(self) -> None:
        self.theta.clamp_(min=0)

    def extra_repr(self) -> str:
        return str(tuple(self.theta.shape))
