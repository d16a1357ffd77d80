# SPDX-License-Identifier: Apache-2.0
"""Order-statistic neurons: SortNet's geometric weights, the top-k mean, and everything between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dplip.errors import ConfigError
from dplip.kernels.order_statistic import order_statistic, order_statistic_weight_grad
from dplip.kernels.order_statistic_interval import order_statistic_interval
from dplip.layers.base import Shapes
from dplip.layers.distance import DistanceLayer, RowNorms

__all__ = ["SortLinear", "geometric_weights", "top_k_weights"]

_SUM_TOLERANCE = 1e-6  # float32 weights that sum to 1; bounds use the sum as stored, not 1


class SortLinear(DistanceLayer):
    r"""``y_o = sum_k c_k |x - w_o|_(k) + b_o`` where ``|.|_(1) >= |.|_(2) >= ...`` and ``c >= 0``, ``sum c <= 1``.

    Shapes: ``x`` [B, d], ``weight`` [m, d], ``order_weights`` (fixed) [K] with K <= d, ``y`` [B, m].

    Guarantee. Every row of the Jacobian is a signed arrangement of ``c``, so the layer is 1-Lipschitz from l_inf to
    l_inf and one example's gradient in ``weight`` has l_2 norm at most ``||c||_2 ||g||_2``, whatever the input. At a
    tie each order statistic credits one index of its own. ``c = (1,)`` is :class:`LinfDistance` at ``p = inf``.

    Source: Zhang, Jiang, He, Wang, Rethinking Lipschitz Neural Networks and Certified Robustness: A Boolean
    Function Perspective, NeurIPS 2022, section 4 (general form, equation 9; geometric weights, proposition 4.3).

    Args:
        in_features, out_features, bias, init, init_scale: see :class:`DistanceLayer`.
        order_weights: ``c``, the weight of the largest, second largest, ... distance.

    Raises:
        ConfigError: ``c`` is empty, longer than ``d``, negative, not finite, or sums to more than 1.
    """

    order_weights: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        order_weights: Sequence[float] | Tensor,
        *,
        bias: bool = True,
        init: str = "normal",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, init=init, init_scale=init_scale)
        c = torch.as_tensor(order_weights, dtype=torch.get_default_dtype()).detach().clone()
        if c.ndim != 1 or not 1 <= len(c) <= in_features:
            raise ConfigError(
                f"{type(self).__name__}: expected 1..{in_features} order weights, got shape {tuple(c.shape)}; "
                "shorten them"
            )
        if not bool(((c >= 0) & torch.isfinite(c)).all()) or float(c.double().sum()) > 1 + _SUM_TOLERANCE:
            raise ConfigError(
                f"{type(self).__name__}: expected order weights >= 0 of sum <= 1, got min {float(c.min()):g} and "
                f"sum {float(c.double().sum()):g}; divide them by their sum"
            )
        self.register_buffer("order_weights", c)

    @classmethod
    def geometric(
        cls,
        in_features: int,
        out_features: int,
        rho: float,
        truncation: int | None = 10,
        **options: Any,
    ) -> SortLinear:
        """SortNet: ``c_k = (1 - rho) rho^(k-1)`` for ``k <= truncation``, divided by its sum ``1 - rho^truncation``.

        ``rho = 0`` is the l_inf distance; ``1 - rho`` is the keep probability of the source's training by
        dropout. ``truncation=None`` keeps every coordinate.
        """
        return cls(in_features, out_features, geometric_weights(in_features, rho, truncation), **options)

    @classmethod
    def top_k_mean(cls, in_features: int, out_features: int, k: int, **options: Any) -> SortLinear:
        """The mean of the ``k`` largest distances: ``c = (1/k, ..., 1/k)``; gradients are at most
        ``||g||_2 / sqrt(k)``."""
        return cls(in_features, out_features, top_k_weights(in_features, k), **options)

    def distance(self, x: Tensor, w: Tensor) -> Tensor:
        return order_statistic(x, w, self.order_weights, self._low(x))

    def distance_interval(self, lower: Tensor, upper: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return order_statistic_interval(lower, upper, w, self.order_weights)

    def row_norms(self) -> RowNorms:
        c = self.order_weights.double()
        return RowNorms(float(c.sum()), math.sqrt(float(c.square().sum())), float(c.max()))

    def per_sample_weight_grad(self, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        return order_statistic_weight_grad(x, w, self.order_weights, g)

    def fan_in(self, shapes: Shapes) -> int:
        return 3 + len(self.order_weights)

    def extra_repr(self) -> str:
        c = self.order_weights
        return f"{super().extra_repr()}, order_weights={len(c)} of sum {float(c.sum()):.4g}"


def geometric_weights(entries: int, rho: float, truncation: int | None) -> Tensor:
    """``c_k = (1 - rho) rho^(k-1)`` for ``k <= min(entries, truncation)``, divided by their sum."""
    if not 0 <= rho < 1 or (truncation is not None and truncation < 1):
        raise ConfigError(
            f"geometric order weights: expected 0 <= rho < 1 and truncation >= 1, got {rho} and {truncation}; fix them"
        )
    k = min(entries, truncation or entries) if rho > 0 else 1
    c = rho ** torch.arange(k, dtype=torch.float64)
    return c / c.sum()


def top_k_weights(entries: int, k: int) -> Tensor:
    """``1/k`` for each of the ``k`` largest of ``entries`` distances."""
    if not 1 <= k <= entries:
        raise ConfigError(f"top-k order weights: expected 1 <= k <= {entries}, got {k}; change k")
    return torch.full((k,), 1 / k, dtype=torch.float64)
