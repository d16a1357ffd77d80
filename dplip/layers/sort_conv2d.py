# SPDX-License-Identifier: Apache-2.0
"""Order-statistic neurons over the windows of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dplip.layers.distance_conv2d import DistanceConv2d
from dplip.layers.sort_linear import SortLinear, geometric_weights, top_k_weights
from dplip.layers.window import Pair, pair

__all__ = ["SortConv2d"]


class SortConv2d(DistanceConv2d, SortLinear):
    r"""``y[o, s] = sum_k c_k |P_s x - w_o|_(k) + b_o`` over windows ``P_s x`` of ``d = (C / groups) kh kw`` entries.

    Guarantee. 1-Lipschitz from l_inf to l_inf; one example's gradient is at most ``||c||_2 min(||g||_1, sqrt(S)
    ||g||_2)`` in ``weight``. Geometry, shapes, errors and proof: :class:`DistanceConv2d`; distance, ``order_weights``
    and options (``bias``, ``init``, ``init_scale``): :class:`SortLinear`.

    Source: Zhang, Jiang, He, Wang, Rethinking Lipschitz Neural Networks and Certified Robustness: A Boolean Function
    Perspective, NeurIPS 2022, section 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        order_weights: Sequence[float] | Tensor,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, order_weights=order_weights, **options)

    @classmethod
    def geometric(  # type: ignore[override]
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        rho: float,
        truncation: int | None = 10,
        **options: Any,
    ) -> SortConv2d:
        """SortNet's ``c_k`` proportional to ``rho^(k-1)`` for ``k <= truncation``, see :meth:`SortLinear.geometric`."""
        d = _window_entries(in_channels, kernel_size, options)
        return cls(in_channels, out_channels, kernel_size, geometric_weights(d, rho, truncation), **options)

    @classmethod
    def top_k_mean(  # type: ignore[override]
        cls, in_channels: int, out_channels: int, kernel_size: int | Pair, k: int, **options: Any
    ) -> SortConv2d:
        """The mean of the ``k`` largest distances: gradients shrink by ``sqrt(k)``."""
        d = _window_entries(in_channels, kernel_size, options)
        return cls(in_channels, out_channels, kernel_size, top_k_weights(d, k), **options)


def _window_entries(in_channels: int, kernel_size: int | Pair, options: dict[str, Any]) -> int:
    return in_channels // max(1, options.get("groups", 1)) * math.prod(pair(kernel_size))
