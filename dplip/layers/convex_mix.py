# SPDX-License-Identifier: Apache-2.0
"""A residual branch mixed in with a learned weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["ConvexMix", "Share"]


class Share(LipschitzLayer):
    """``y = a x``, or ``(1 - a) x`` for the complement, with a learned ``a`` that :meth:`project_` keeps in [0, 1].

    Shapes: ``x`` [B, *], ``mix`` [1], ``y`` as ``x``.

    Guarantee. Lipschitz constant ``|a|`` or ``|1 - a|`` in every norm. One example's gradient is ``+-<g, x>``, at most
    ``min(||g||_1 ||x||_inf, ||g||_2 ||x||_2, ||g||_inf ||x||_1)``.

    Args:
        mix: the parameter [1], which two layers may share.
        complement: scale by ``1 - a``.

    Raises:
        ConfigError: ``mix`` is not one number in [0, 1].
    """

    def __init__(self, mix: nn.Parameter, complement: bool = False) -> None:
        super().__init__()
        if tuple(mix.shape) != (1,) or not 0 <= float(mix.detach()) <= 1:
            raise ConfigError(f"Share: expected one number in [0, 1] of shape (1,), got {mix.tolist()}; fix it")
        self.mix, self.complement = mix, complement

    def _factor(self) -> Tensor:
        return 1 - self.mix if self.complement else self.mix

    def forward(self, x: Tensor) -> Tensor:
        return x * self._factor()

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        size = abs(float(self._factor().detach()))
        return OperatorNorms.uniform(math.inf if math.isnan(size) else size)

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        return {"mix": g.dot(x)}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        inner = (g * x).flatten(1).sum(1, keepdim=True)
        return {"mix": -inner if self.complement else inner}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self(lower), self(upper)
        return torch.minimum(a, b), torch.maximum(a, b)

    @torch.no_grad()
    def project_(self) -> None:
        self.mix.clamp_(0, 1)

    def fan_in(self, shapes: Shapes) -> int:
        return 2

    def extra_repr(self) -> str:
        return f"complement={self.complement}"


class ConvexMix(nn.Module):
    """``y = (1 - a) x + a f(x)`` with a learned ``a`` in [0, 1], for any traceable ``branch`` f of equal shapes.

    Not a leaf: the trace sees both shares, the branch and the addition. So the norms are ``(1 - a) + a L_f``, the
    branch receives the cotangent times ``a``, and one example's gradient in ``a`` is at most the pairing of its
    cotangent with ``||x|| + ||f(x)||``. A 1-Lipschitz branch gives a 1-Lipschitz mix at every ``a``. For a fixed ``a``
    use :class:`dplip.layers.Residual`.

    Raises:
        ConfigError: ``mix`` is outside [0, 1].
    """

    def __init__(self, branch: nn.Module, mix: float = 0.5) -> None:
        super().__init__()
        weight = nn.Parameter(torch.full((1,), float(mix)))
        self.keep, self.take = Share(weight, complement=True), Share(weight)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.keep(x) + self.take(self.branch(x))
        return y
