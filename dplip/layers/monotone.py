# SPDX-License-Identifier: Apache-2.0
"""Monotone networks: a linear ramp that outweighs a Lipschitz model's slopes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.errors import ConfigError
from dplip.layers.base import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms
from dplip.operator_norm import matrix_norms

__all__ = ["MonotoneResidual", "Ramp"]


class Ramp(LipschitzLayer):
    r"""``y_j = sum_i strength_i directions_ji x_i``: a linear map of fixed signs and non-negative strengths.

    Shapes: ``x`` [B, d], ``directions`` (fixed) [outputs, d] in {-1, 0, 1}, ``strength`` [1] or [d], ``y`` [B,
    outputs].

    Guarantee. The five operator norms are those of the matrix as it is. For one direction on all d inputs and m equal
    outputs they are ``strength`` times (d, sqrt(d), sqrt(d m), m, 1). One example's gradient in a learned strength is
    ``<g, S x>`` for a common one, at most ``||g||_1 ||x||_1``, and ``x * (S^T g)`` for one per feature, at most
    ``||g||_1 ||x||_2``; sharper pairings are taken where they are known.

    Args:
        directions: [outputs, d].
        strength: initial value of every strength.
        learned: ``None`` keeps it fixed, ``"common"`` learns one number, ``"feature"`` one per input.
        least: what :meth:`project_` keeps every learned strength above or at.

    Raises:
        ConfigError: shapes or values do not fit, or ``0 <= least <= strength < inf`` does not hold.
        ValueError: ``forward`` gets anything but [B, d].
    """

    directions: Tensor

    def __init__(
        self, directions: Tensor, strength: float = 1.0, *, learned: str | None = None, least: float = 0.0
    ) -> None:
        super().__init__()
        signs = torch.as_tensor(directions, dtype=torch.get_default_dtype()).detach().clone()
        if signs.ndim != 2 or 0 in signs.shape or not bool(((signs == 0) | (signs.abs() == 1)).all()):
            raise ConfigError(
                f"Ramp: expected directions [outputs, d] in -1, 0, 1, got shape {tuple(signs.shape)} with values "
                f"{sorted(set(signs.flatten().tolist()))[:5]}; write one row per output"
            )
        if learned not in (None, "common", "feature") or not 0 <= least <= strength < math.inf:
            raise ConfigError(
                "Ramp: expected learned None, 'common' or 'feature' and 0 <= least <= strength < inf, "
                f"got {learned!r}, {least} and {strength}; fix them"
            )
        self.learned, self.least = learned, float(least)
        self.register_buffer("directions", signs)
        value = torch.full((signs.shape[1] if learned == "feature" else 1,), float(strength))
        if learned is None:
            self.register_buffer("strength", value)
        else:
            self.strength = nn.Parameter(value)

    def matrix(self) -> Tensor:
        """The linear map [outputs, d]."""
        return self.directions * self.strength

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.directions.shape[1]:
            raise ValueError(f"Ramp: expected x [B, {self.directions.shape[1]}], got {tuple(x.shape)}")
        return F.linear(x, self.matrix())

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return matrix_norms(self.directions.double() * self.strength.detach().double())

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        if self.learned is None:
            return {}
        signs = matrix_norms(self.directions).closed(shapes.in_dim, shapes.out_dim)
        if self.learned == "common":
            return {"strength": signs.push(x, shapes.out_dim).dot(g)}
        slope = signs.pull(g, shapes.in_dim)  # ||x * s||_2 <= ||x||_2 ||s||_inf and ||x||_inf ||s||_2
        return {"strength": min(_times(x.l2, slope.linf), _times(x.linf, slope.l2))}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        if self.learned is None:
            return {}
        each = x * (g @ self.directions)
        return {"strength": each if self.learned == "feature" else each.sum(1, keepdim=True)}

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix()
        centre, radius = F.linear((lower + upper) / 2, matrix), F.linear((upper - lower) / 2, matrix.abs())
        return centre - radius, centre + radius

    @torch.no_grad()
    def project_(self) -> None:
        if self.learned is not None:
            self.strength.clamp_(min=self.least)

    def fan_in(self, shapes: Shapes) -> int:
        return shapes.in_dim + 1

    def extra_repr(self) -> str:
        return f"{self.directions.shape[1]}, {self.directions.shape[0]}, learned={self.learned}, least={self.least:g}"


class MonotoneResidual(nn.Module):
    """``g_j(x) = f_j(x) + sum_i strength_i directions_ji x_i`` for any traceable model f on [B, d].

    Where ``strength_i >= B_i`` with ``B_i >= |f_j(x + t e_i) - f_j(x)| / |t|``, g is monotone in the direction
    ``directions_ji`` of ``x_i``, and its slope lies in [strength_i - B_i, strength_i + B_i]:
    :func:`dplip.certify.certify_monotone` proves it for the weights at hand. So a private run keeps it through any
    noise, as long as f stays in its norm balls. Chains that give ``B_i = 1``: first layer with ball ``"entries"`` or
    ``"rows_l2"`` (l_1 or l_2 to l_inf), then ``"rows_l1"``; or ``"columns_l1"`` throughout.

    Not a leaf: the trace sees the branch, the ramp and the addition. So the wrapper's Lipschitz constants are the
    branch's plus ``strength`` times (d, sqrt(d), sqrt(d m), m, 1): on one feature, up to twice the branch's, not once.

    Source: Kitouni, Nolte, Williams, Expressive Monotonic Neural Networks, ICLR 2023, section 3.

    Args:
        branch: f.
        directions: [d], the same for every output, or [outputs, d]; -1 decreasing, 0 free, 1 increasing.
        outputs: number of outputs of f.
        strength, learned, least: see :class:`Ramp`. ``least`` at the branch's own bound keeps a learned strength
        monotone.

    Raises:
        ConfigError: ``directions`` is neither shape, or an argument of :class:`Ramp` is out of range.
    """

    def __init__(
        self,
        branch: nn.Module,
        directions: Tensor,
        outputs: int = 1,
        *,
        strength: float = 1.0,
        learned: str | None = None,
        least: float = 0.0,
    ) -> None:
        super().__init__()
        signs = torch.as_tensor(directions)
        if signs.ndim == 1:
            signs = signs.expand(outputs, -1)
        if signs.ndim != 2 or signs.shape[0] != outputs:
            raise ConfigError(
                f"MonotoneResidual: expected directions [d] or [{outputs}, d], got {tuple(signs.shape)}; "
                "give every feature its sign"
            )
        self.branch = branch
        self.ramp = Ramp(signs, strength, learned=learned, least=least)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x) + self.ramp(x)
        return y


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b
