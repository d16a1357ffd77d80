# SPDX-License-Identifier: Apache-2.0
"""The operators of :mod:`dplip.kernels.order_statistic` and its intervals, on the kernels beside this file.

float32 and narrower operands. Only distances of float16 operands are compared in float16, in training: intervals, and
whatever is float32, are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dplip.kernels.triton.largest import interval, largest, largest_with_index
from dplip.kernels.triton.scatter import scatter, scatter_examples
from dplip.kernels.triton.tile import LOWER, UPPER
from dplip.kernels.triton.top_k import top_k

__all__ = [
    "order_statistic",
    "order_statistic_backward",
    "order_statistic_interval",
    "order_statistic_interval_backward",
    "order_statistic_weight_grad",
]


def order_statistic(x: Tensor, w: Tensor, c: Tensor, with_index: bool) -> tuple[Tensor, Tensor]:
    """See :func:`dplip.kernels.order_statistic.order_statistic_reference`."""
    return _selected(x, w, c, with_index, None, 0)


def _selected(x: Tensor, w: Tensor, c: Tensor, with_index: bool, x2: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    if len(c) > 1:
        return top_k(x, w, c, with_index, x2, kind)
    if with_index:
        y, index = largest_with_index(x, w, c, x2, kind)
        return y, index.unsqueeze(-1)
    return largest(x, w, c, x2, kind), torch.empty(0, dtype=torch.int32, device=x.device)


def order_statistic_backward(
    x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor]:
    """Sums in a fixed order where torch is asked for determinism, see :mod:`dplip.kernels.triton.scatter`."""
    dx, _, dw = scatter(x, w, c, index, dy, need_x, need_w)
    return dx, dw


def order_statistic_weight_grad(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
    """Every example's own gradient [B, O, I]."""
    return scatter_examples(x, w, c, index, dy)


def order_statistic_interval(
    lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, with_index: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both ends, for ``lower <= upper``; one pass where the largest element and no index is asked for."""
    if len(c) == 1 and not with_index:
        none = torch.empty(0, dtype=torch.int32, device=lower.device)
        return *interval(lower, upper, w, c), none, none
    low, at_low = _selected(lower, w, c, with_index, upper, LOWER.value)
    high, at_high = _selected(lower, w, c, with_index, upper, UPPER.value)
    return low, high, at_low, at_high


def order_statistic_interval_backward(
    lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, low_index: Tensor, high_index: Tensor,
    dlow: Tensor, dhigh: Tensor, need_lower: bool, need_upper: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums of both ends' gradients."""
    need_x = need_lower or need_upper
    ends = [
        scatter(lower, w, c, index, dy, need_x, need_w, x2=upper, kind=kind)
        for index, dy, kind in ((low_index, dlow, LOWER.value), (high_index, dhigh, UPPER.value))
    ]
    dlower, dupper, dw = (a.add_(b) for a, b in zip(*ends, strict=True))
    nothing = dlow.new_empty(0)
    return dlower if need_lower else nothing, dupper if need_upper else nothing, dw
