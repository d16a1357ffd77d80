# SPDX-License-Identifier: Apache-2.0
"""Dense affine maps and the bounds of whatever weight they hold."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dplip.layers.base import LipschitzLayer, Shapes
from dplip.layers.snapshot import Snapshot
from dplip.norms import Norms, OperatorNorms
from dplip.operator_norm import matrix_norms

__all__ = ["Affine"]


class Affine(LipschitzLayer):
    r"""``y = W x + b`` with an unconstrained weight; the base of :class:`dplip.layers.NormalizedLinear`.

    Shapes: ``x`` [B, in_features], ``weight`` [out_features, in_features], ``bias`` [out_features] or None, ``y`` [B,
    out_features].

    Guarantee. The five operator norms are computed from the weight as it is (float64, rounded up). One example has
    ``||dL/dW||_F = ||g||_2 ||x||_2`` exactly and ``||dL/db||_2 = ||g||_2``: the input's l_2 norm must be bounded.

    Raises:
        ValueError: ``forward`` gets anything but [B, in_features].
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._norms: tuple[Snapshot, OperatorNorms] | None = None
        self._proved: tuple[Snapshot, float] | None = None  # a spectral bound that the projection left behind

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"{type(self).__name__}: expected x [B, {self.weight.shape[1]}], got {tuple(x.shape)}; flatten it"
            )
        return F.linear(x, self.weight, self.bias)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        w = self.weight.detach()
        if self._norms is None or not self._norms[0].holds(w):
            now = Snapshot(w)
            proved = self._proved[1] if self._proved is not None and self._proved[0].same(now) else None
            self._norms = (now, matrix_norms(w, proved))
        return self._norms[1]

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        bounds = {"weight": 0.0 if g.l2 == 0 or x.l2 == 0 else g.l2 * x.l2}
        return bounds if self.bias is None else bounds | {"bias": g.l2}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        grads = {"weight": g.unsqueeze(2) * x.unsqueeze(1)}
        return grads if self.bias is None else grads | {"bias": g}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        centre = F.linear((lower + upper) / 2, self.weight, self.bias)
        radius = F.linear((upper - lower) / 2, self.weight.abs())
        return centre - radius, centre + radius

    def fan_in(self, shapes: Shapes) -> int:
        return shapes.in_dim + 1
