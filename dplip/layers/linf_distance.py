# SPDX-License-Identifier: Apache-2.0
"""l_inf-distance neurons and their power-mean relaxation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.errors import ConfigError
from dplip.kernels.order_statistic import order_statistic, order_statistic_ghost_norm, order_statistic_weight_grad
from dplip.kernels.order_statistic_interval import order_statistic_interval
from dplip.kernels.power_mean import power_mean, power_mean_ghost_norm, power_mean_interval, power_mean_weight_grad
from dplip.layers.base import Shapes
from dplip.layers.distance import DistanceLayer, RowNorms

__all__ = ["LinfDistance"]


class LinfDistance(DistanceLayer):
    r"""``y_o = d^(-1/p) ||x - w_o||_p + b_o`` with ``d = in_features``; at ``p = inf``, ``||x - w_o||_inf + b_o``.

    Shapes: ``x`` [B, d], ``weight`` [m, d], ``y`` [B, m].

    Guarantee. 1-Lipschitz from l_inf to l_inf at *every* ``p >= 2``, so bounds and certificates hold while ``p`` is
    annealed. One example's gradient is at most ``d^(-1/p) ||g||_2`` in ``weight`` (``||g||_2`` at ``p = inf``),
    whatever the input and the weights. With ``power_mean=False`` the factor ``d^(-1/p)`` is dropped (the plain l_p
    neuron of the source): rows then have l_1 norm up to ``d^(1/p)``, and such a layer is certified at ``p = inf`` only.

    Source: Zhang, Cai, Lu, He, Wang, Towards Certifying L-infinity Robustness using Neural Networks with
    L-inf-dist Neurons, ICML 2021, equation 2; the power-mean normalisation is ours (Hoelder: ``||r||_1 <= d^(1/p)
    ||r||_q`` and the row of an l_p distance has l_q norm 1).

    Args:
        in_features, out_features, bias, init, init_scale: see :class:`DistanceLayer`.
        p: exponent, 2 <= p <= inf. Assign ``layer.p`` to anneal it.
        power_mean: keep the normalisation ``d^(-1/p)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        p: float = math.inf,
        power_mean: bool = True,
        init: str = "normal",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, init=init, init_scale=init_scale)
        self.power_mean = power_mean
        self.p = p
        self.register_buffer("_one", torch.ones(1), persistent=False)

    @property
    def p(self) -> float:
        """Exponent of the distance, in [2, inf]."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        if not 2 <= value:
            raise ConfigError(f"LinfDistance: expected 2 <= p <= inf, got {value}; no bound is offered below 2")
        self._p = float(value)

    def _gain(self) -> float:
        """Ratio of this layer to the power mean."""
        return 1.0 if self.power_mean or math.isinf(self.p) else self.in_features ** (1 / self.p)

    def distance(self, x: Tensor, w: Tensor) -> Tensor:
        if math.isinf(self.p):
            return order_statistic(x, w, self._one, self._low(x))
        return self._gain() * power_mean(x, w, self.p).to(w.dtype)

    def distance_interval(self, lower: Tensor, upper: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        if math.isinf(self.p):
            return order_statistic_interval(lower, upper, w, self._one)
        low, high = power_mean_interval(lower, upper, w, self.p)
        return self._gain() * low, self._gain() * high

    def row_norms(self) -> RowNorms:
        if math.isinf(self.p):
            return RowNorms(1.0, 1.0, 1.0)
        row = self._gain() * self.in_features ** (-1 / self.p)
        return RowNorms(self._gain(), row, row)

    def per_sample_weight_grad(self, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        if math.isinf(self.p):
            return order_statistic_weight_grad(x, w, self._one, g)
        return self._gain() * power_mean_weight_grad(x, w, self.p, g)

    def weight_grad_norm(self, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        """l_2 norm [B] of every example's :meth:`per_sample_weight_grad`, which is not formed."""
        if math.isinf(self.p):
            return order_statistic_ghost_norm(x, w, self._one, g)
        return self._gain() * power_mean_ghost_norm(x, w, self.p, g)

    def refuses_certificate(self) -> str | None:
        if math.isinf(self.p) or self.power_mean:
            return None
        return f"p = {self.p:g} without the power-mean normalisation is not the deployed network; set p = inf"

    def fan_in(self, shapes: Shapes) -> int:
        if math.isinf(self.p):
            return 3
        # The power multiplies a rounding by p. The slack of a fan-in n is n^1.5 u, so this many stand for 4 p u.
        return self.in_features + 16 + math.ceil((4 * self.p) ** (2 / 3))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p:g}"
