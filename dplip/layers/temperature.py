# SPDX-License-Identifier: Apache-2.0
"""A learned positive scale of all entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["LearnedScale"]


class LearnedScale(LipschitzLayer):
    """``y = s x`` with one learned temperature ``s``, kept in [lower, upper] by :meth:`project_`.

    Shapes: ``x`` [B, *], ``scale`` [1], ``y`` as ``x``.

    Guarantee. Lipschitz constant ``|s|`` in every norm; a certified radius of logits does not change with ``s > 0``.
    One example's gradient is ``<g, x>``, at most ``min(||g||_1 ||x||_inf, ||g||_2 ||x||_2, ||g||_inf ||x||_1)``.
    Between projections ``s`` may leave the interval; bounds follow its current value. The scale is the parameter
    itself, never an exponential of one: a bound on the gradient of a parametrised value does not bound that of its
    parameter.

    Args:
        scale: initial value.
        lower, upper: ``0 < lower <= upper``, the set that :meth:`project_` keeps.

    Raises:
        ConfigError: the three are not ``0 < lower <= scale <= upper``.
    """

    def __init__(self, scale: float = 1.0, lower: float = 1e-3, upper: float = math.inf) -> None:
        super().__init__()
        if not 0 < lower <= scale <= upper or math.isinf(scale):
            raise ConfigError(
                f"LearnedScale: expected 0 < lower <= scale <= upper, got {lower}, {scale} and {upper}; fix them"
            )
        self.lower, self.upper = float(lower), float(upper)
        self.scale = nn.Parameter(torch.full((1,), float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        size = abs(float(self.scale.detach()))
        return OperatorNorms.uniform(math.inf if math.isnan(size) else size)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        return {"scale": g.dot(x)}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        return {"scale": (g * x).flatten(1).sum(1, keepdim=True)}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self(lower), self(upper)
        return torch.minimum(a, b), torch.maximum(a, b)

    @torch.no_grad()
    def project_(self) -> None:
        self.scale.clamp_(self.lower, self.upper)

    def fan_in(self, shapes: Shapes) -> int:
        return 1

    def extra_repr(self) -> str:
        return f"lower={self.lower:g}, upper={self.upper:g}"
