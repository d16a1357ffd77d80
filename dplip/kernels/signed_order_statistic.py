# SPDX-License-Identifier: Apache-2.0
"""Order statistics with signed weights of each neuron's own: ``y[b, o] = sum_k c[o, k] s_(k)(x_b, w_o)``.

``s_(1) >= s_(2) >= ...`` are the ``K`` largest entries of ``|x_b - w_o|``, or of ``x_b - w_o`` with
``magnitude=False``. Every order statistic credits an index of its own, so a row of the Jacobian is a signed arrangement
of ``c_o`` at ties too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dplip.kernels.distance import blocks, check_operands, gather_differences
from dplip.kernels.folding import fold, sample_by_sample, unfold

__all__ = [
    "signed_order_statistic",
    "signed_order_statistic_indices",
    "signed_order_statistic_interval",
    "sorted_values",
]


@torch.library.custom_op("dplip::signed_order_statistic_indices", mutates_args=())
def _indices_op(x: Tensor, w: Tensor, k: int, magnitude: bool) -> Tensor:
    index = torch.empty(x.shape[0], w.shape[0], k, dtype=torch.int64, device=x.device)
    for rows, t in blocks(x, w):
        index[rows] = (t.abs_() if magnitude else t).topk(k, dim=-1, sorted=True)[1]
    return index


@_indices_op.register_fake
def _(x: Tensor, w: Tensor, k: int, magnitude: bool) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], k, dtype=torch.int64)


class _Indices(torch.autograd.Function):
    """Has no derivative; a Function for its ``vmap``."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, k: int, magnitude: bool) -> Tensor:
        index: Tensor = _indices_op(x, w, k, magnitude)
        return index

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[None, None, None, None]:
        return None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor, k: int, magnitude: bool
    ) -> tuple[Any, Any]:
        if in_dims[1] is not None:
            return sample_by_sample(_Indices.apply, info.batch_size, in_dims, (x, w, k, magnitude))
        return unfold(_Indices.apply(fold(x, in_dims[0], info.batch_size), w, k, magnitude), info.batch_size), 0


def signed_order_statistic_indices(x: Tensor, w: Tensor, k: int, magnitude: bool) -> Tensor:
    """Where the ``k`` largest entries sit: int64 [B, O, k], in descending order of value."""
    check_operands("signed_order_statistic", x, w)
    index: Tensor = _Indices.apply(x.detach(), w.detach(), k, magnitude)
    return index


def sorted_values(x: Tensor, w: Tensor, index: Tensor, magnitude: bool) -> Tensor:
    """The order statistics [B, O, k] at ``index``. Differentiable in x and w."""
    t = gather_differences(x, w, index)
    return t.abs() if magnitude else t


def signed_order_statistic(x: Tensor, w: Tensor, c: Tensor, magnitude: bool = True) -> Tensor:
    """``x`` [B, I], ``w`` [O, I], ``c`` [O, K] with K <= I -> [B, O]. Differentiable in x, w and c.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_operands("signed_order_statistic", x, w)
    if c.ndim != 2 or c.shape[0] != w.shape[0] or not 1 <= c.shape[1] <= x.shape[1] or c.dtype != x.dtype:
        raise ValueError(
            f"signed_order_statistic: expected weights [{w.shape[0]}, 1..{x.shape[1]}] of {x.dtype}, "
            f"got {tuple(c.shape)} of {c.dtype}"
        )
    index = signed_order_statistic_indices(x, w, c.shape[1], magnitude)
    return (sorted_values(x, w, index, magnitude) * c).sum(-1)


def signed_order_statistic_interval(
    lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, magnitude: bool = True
) -> tuple[Tensor, Tensor]:
    """Bounds over the box: each order statistic by its exact range, times the positive and negative parts of ``c``.

    Exact where all weights of a neuron have one sign; otherwise its terms are bounded one by one.
    """
    k = c.shape[1]
    low, high = lower.new_empty(lower.shape[0], w.shape[0]), upper.new_empty(upper.shape[0], w.shape[0])
    plus, minus = c.clamp_min(0), c.clamp_max(0)
    for (rows, below), (_, above) in zip(blocks(lower, w), blocks(upper, w), strict=True):
        if magnitude:
            below, above = torch.maximum(below, -above).clamp_min(0), torch.maximum(below.abs(), above.abs())
        least, most = below.topk(k, dim=-1, sorted=True)[0], above.topk(k, dim=-1, sorted=True)[0]
        low[rows] = (plus * least + minus * most).sum(-1)
        high[rows] = (plus * most + minus * least).sum(-1)
    return low, high
