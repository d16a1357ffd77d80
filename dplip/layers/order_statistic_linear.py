# SPDX-License-Identifier: Apache-2.0
"""The general SortNet neuron: signed, per-neuron, optionally learned weights on sorted values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.kernels.signed_order_statistic import (
    signed_order_statistic,
    signed_order_statistic_indices,
    signed_order_statistic_interval,
    sorted_values,
)
from dplip.layers.base import Shapes
from dplip.layers.distance import DistanceLayer, RowNorms
from dplip.norms import Norms

__all__ = ["OrderStatisticLinear"]

_SUM_TOLERANCE = 1e-6  # float32 weights that sum to 1; bounds use the sum as stored, not 1


class OrderStatisticLinear(DistanceLayer):
    r"""``y_o = sum_k c_ok s_(k) + b_o``, ``s_(1) >= s_(2) >= ...`` the sorted ``|x - w_o|``, with
    ``sum_k |c_ok| <= 1``.

    Shapes: ``x`` [B, d], ``weight`` [m, d], ``order_weights`` [m, K] with K <= d (or [K], shared), ``y`` [B, m].

    Guarantee. Every row of the Jacobian is a signed arrangement of ``c_o``: its l_1, l_2 and l_inf norms are those of
    ``c_o``, whatever the input, so the layer is 1-Lipschitz in l_inf and one example's gradient in ``weight`` is at
    most ``max_o ||c_o||_2 ||g||_2``. Learned order weights see ``g_o s_(1..K)``, at most ``||g||_2 max_o
    min(||x||_2 + ||w_o||_2, sqrt(K) (||x||_inf + ||w_o||_inf))``, which needs a bounded input.

    Special cases: shared non-negative weights are :class:`SortLinear`, ``c = (1,)`` is :class:`LinfDistance` at
    ``p = inf`` (both with faster kernels), and :meth:`maxmin` is :class:`MaxMin`, with ``magnitude=False``.

    Source: Zhang, Jiang, He, Wang, Rethinking Lipschitz Neural Networks and Certified Robustness: A Boolean
    Function Perspective, NeurIPS 2022, equation 9 and section 4.1.

    Args:
        in_features, out_features, bias, init, init_scale: see :class:`DistanceLayer`.
        order_weights: ``c``, of any sign.
        magnitude: sort ``|x - w|``; otherwise sort ``x - w``.
        learned: train ``c`` too; :meth:`project_` divides rows by their l_1 norm where it exceeds 1.

    Raises:
        ConfigError: ``c`` has a wrong shape, is not finite, or a row's l_1 norm exceeds 1.
    """

    order_weights: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        order_weights: Sequence[float] | Sequence[Sequence[float]] | Tensor,
        *,
        magnitude: bool = True,
        learned: bool = False,
        bias: bool = True,
        init: str = "normal",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, init=init, init_scale=init_scale)
        c = torch.as_tensor(order_weights, dtype=torch.get_default_dtype()).detach()
        c = c.expand(out_features, -1).clone() if c.ndim == 1 else c.clone()
        if c.ndim != 2 or c.shape[0] != out_features or not 1 <= c.shape[1] <= in_features:
            raise ConfigError(
                f"OrderStatisticLinear: expected order weights [{out_features}, 1..{in_features}], got "
                f"{tuple(c.shape)}; give one row per neuron, or one row for all"
            )
        largest = float(c.double().abs().sum(1).max())
        if not largest <= 1 + _SUM_TOLERANCE:  # also catches NaN
            raise ConfigError(
                f"OrderStatisticLinear: expected rows with sum |c| <= 1, got {largest:g}; divide them by their l_1 norm"
            )
        self.magnitude, self.learned = magnitude, learned
        if learned:
            self.order_weights = nn.Parameter(c)
        else:
            self.register_buffer("order_weights", c)

    @classmethod
    def maxmin(cls, features: int, reach: float) -> OrderStatisticLinear:
        """:class:`MaxMin` on inputs with ``|x_i| <= reach``: each neuron sorts a pair, all others are pushed below it.

        Raises:
            ConfigError: ``features`` is odd or ``reach`` is not positive.
        """
        if features < 2 or features % 2 or not 0 < reach < math.inf:
            raise ConfigError(
                f"OrderStatisticLinear.maxmin: expected an even width and a finite reach > 0, got {features} and "
                f"{reach}; fix them"
            )
        c = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(features // 2, 1)
        layer = cls(features, features, c, magnitude=False, bias=False)
        pair = torch.arange(features) // 2
        with torch.no_grad():
            layer.weight.copy_((pair[:, None] != pair[None, :]) * (4.0 * reach))
        return layer

    def distance(self, x: Tensor, w: Tensor) -> Tensor:
        return signed_order_statistic(x, w, self.order_weights, self.magnitude)

    def distance_interval(self, lower: Tensor, upper: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return signed_order_statistic_interval(lower, upper, w, self.order_weights, self.magnitude)

    def row_norms(self) -> RowNorms:
        c = self.order_weights.detach().double().abs()
        return RowNorms(float(c.sum(1).max()), math.sqrt(float(c.square().sum(1).max())), float(c.max()))

    def _indices(self, x: Tensor, w: Tensor) -> Tensor:
        return signed_order_statistic_indices(x, w, self.order_weights.shape[1], self.magnitude)

    def per_sample_weight_grad(self, x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        index = self._indices(x, w)
        s = self.order_weights * g.unsqueeze(-1)
        if self.magnitude:
            s = s * sorted_values(x, w, index, magnitude=False).sign()
        return x.new_zeros(len(x), *w.shape).scatter_(2, index, -s)

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        grads = super().per_sample_grad(x, g)
        if self.learned:
            values = sorted_values(x, self.weight, self._indices(x, self.weight), self.magnitude)
            grads["order_weights"] = values * g.unsqueeze(-1)
        return grads

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        bounds = super().param_sensitivity(x, g, shapes)
        if self.learned:
            w = self.weight.detach().double()
            by_l2 = x.l2 + float(torch.linalg.vector_norm(w, dim=1).max())
            by_linf = math.sqrt(self.order_weights.shape[1]) * (x.linf + float(w.abs().max()))
            bounds["order_weights"] = 0.0 if g.l2 == 0 else g.l2 * min(by_l2, by_linf)
        return bounds

    @torch.no_grad()
    def project_(self) -> None:
        if self.learned:
            self.order_weights.div_(self.order_weights.abs().sum(1, keepdim=True).clamp_min(1.0))

    def fan_in(self, shapes: Shapes) -> int:
        return 3 + self.order_weights.shape[1]

    def extra_repr(self) -> str:
        kind = "|x - w|" if self.magnitude else "x - w"
        k = self.order_weights.shape[1]
        return f"{super().extra_repr()}, order_weights={k} on sorted {kind}, learned={self.learned}"
