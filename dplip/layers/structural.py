# SPDX-License-Identifier: Apache-2.0
"""Layers that move, shift or join values: flatten, subtract a public constant, residual branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import OperatorNorms

__all__ = ["Flatten", "Reshape", "Residual", "Shift"]


class Reshape(LipschitzLayer):
    """Gives every example the shape ``size``; a permutation-free rearrangement, norm 1 in every norm.

    ``size`` may hold one -1. Raises ``RuntimeError`` (from torch) where the entries do not fit.
    """

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:  # -1 is ambiguous for an empty batch
            return x.reshape(0, *torch.empty(x.shape[1:], device="meta").reshape(self.size).shape)
        return x.reshape(x.shape[0], *self.size)

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms.uniform(1.0)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.size))


class Flatten(Reshape):
    """[B, *] -> [B, features]."""

    def __init__(self) -> None:
        super().__init__(-1)


class Shift(LipschitzLayer):
    """``y = x - offset`` with a fixed public ``offset`` (a number or one example's tensor); norm 1 in every norm.

    Raises:
        ConfigError: ``offset`` is not finite.
        ValueError: ``offset`` would broadcast an example to another shape, or reach its batch axis.
    """

    offset: Tensor

    def __init__(self, offset: float | Tensor) -> None:
        super().__init__()
        value = torch.as_tensor(offset, dtype=torch.get_default_dtype()).detach().clone()
        if not bool(torch.isfinite(value).all()):
            raise ConfigError("Shift: expected a finite offset, got NaN or infinity; fix it")
        self.register_buffer("offset", value)

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.offset
        if y.shape != x.shape or self.offset.ndim >= x.ndim:
            raise ValueError(
                f"Shift: expected an offset for examples of shape {tuple(x.shape[1:])}, got {tuple(self.offset.shape)}"
            )
        return y

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms.uniform(1.0)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)

    def fan_in(self, shapes: Shapes) -> int:
        return 1


class Residual(nn.Module):
    """``y = x + f(x)``, or with ``mix = a`` the convex ``y = (1 - a) x + a f(x)``, for any traceable ``branch`` f.

    Not a leaf: the trace sees the branch and the addition, so norms are ``1 + L_f`` or ``(1 - a) + a L_f``.

    Raises:
        ConfigError: ``mix`` is outside [0, 1].
    """

    def __init__(self, branch: nn.Module, mix: float | None = None) -> None:
        super().__init__()
        if mix is not None and not 0 <= mix <= 1:
            raise ConfigError(f"Residual: expected 0 <= mix <= 1, got {mix}; fix it")
        self.branch, self.mix = branch, mix

    def forward(self, x: Tensor) -> Tensor:
        if self.mix is None:
            return x + self.branch(x)
        return x * (1 - self.mix) + self.branch(x) * self.mix
