# SPDX-License-Identifier: Apache-2.0
"""Order-statistic distance: ``y[b, o] = sum_k c_k |x_b - w_o|_(k)``, ``|.|_(1) >= |.|_(2) >= ...``.

``c = (1,)`` is the l_inf distance (Zhang, Cai, Lu, He, Wang: Towards Certifying L-infinity Robustness using
Neural Networks with L-inf-dist Neurons, ICML 2021); geometric ``c`` is the sort neuron (Zhang, Jiang, He,
Wang: Rethinking Lipschitz Neural Networks and Certified Robustness: A Boolean Function Perspective, NeurIPS
2022). Only the ``K = len(c)`` largest entries are kept, each with its own index: at a tie exactly one
index is credited per order statistic, so a row of the Jacobian is always a signed permutation of ``c``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dplip.kernels.dispatch import register, select
from dplip.kernels.distance import blocks, check_operands, gather_signs

__all__ = [
    "order_statistic",
    "order_statistic_indices",
    "order_statistic_interval",
    "order_statistic_reference",
]


@register("order_statistic", "reference")
def order_statistic_reference(x: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Values [B, O] and the int32 indices [B, O, K] of the K largest ``|x - w|``, in descending order."""
    k = len(c)
    y = x.new_empty(x.shape[0], w.shape[0])
    index = torch.empty(*y.shape, k, dtype=torch.int32, device=x.device)
    for rows, t in blocks(x, w):
        value, at = _largest(t.abs_(), k)
        y[rows], index[rows] = value @ c, at.to(torch.int32)
    return y, index


def _largest(t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries of non-negative ``t`` along the last axis, descending, with distinct indices.

    ``t`` is overwritten. Repeated maxima beat a partial sort on the CPU while ``k`` is small.
    """
    if k > 8:
        return t.topk(k, dim=-1, sorted=True)
    values, indices = [], []
    for _ in range(k):
        value, at = t.max(-1, keepdim=True)
        values.append(value)
        indices.append(at)
        if len(values) < k:
            t.scatter_(-1, at, -1.0)
    return torch.cat(values, -1), torch.cat(indices, -1)


def order_statistic_indices(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The credited coordinates [B, O, K] (int64): where the K largest ``|x_b - w_o|`` sit."""
    check_operands("order_statistic", x, w)
    with torch.no_grad():
        index: Tensor = select("order_statistic", x.device.type)(x, w, c)[1]
    return index.long()


def order_statistic_interval(lower: Tensor, upper: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Exact range of every neuron over the box ``lower <= x <= upper``.

    ``|x_i - w_i|`` ranges over ``[max(l_i - w_i, w_i - u_i, 0), max(|l_i - w_i|, |u_i - w_i|)]``
    independently per coordinate, and order statistics are monotone in every coordinate.
    """
    check_operands("order_statistic_interval", lower, w)
    check_operands("order_statistic_interval", upper, w)
    low, high = lower.new_empty(lower.shape[0], w.shape[0]), upper.new_empty(upper.shape[0], w.shape[0])
    for (rows, below), (_, above) in zip(blocks(lower, w), blocks(upper, w), strict=True):
        low[rows] = _largest(torch.maximum(below, -above).clamp_min_(0), len(c))[0] @ c
        high[rows] = _largest(torch.maximum(below.abs_(), above.abs_()), len(c))[0] @ c
    return low, high


class _OrderStatistic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, c: Tensor) -> Tensor:
        y, index = select("order_statistic", x.device.type)(x, w, c)
        ctx.save_for_backward(x, w, c, index)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, c, saved = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        dx, dw = torch.zeros_like(x) if need_x else None, torch.zeros_like(w) if need_w else None
        step = max(1, (1 << 21) // max(1, w.shape[0] * len(c)))
        rows = (torch.arange(w.shape[0], device=w.device) * w.shape[1])[None, :, None]
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step)
            index = saved[part].long()
            s = gather_signs(x[part], w, index) * c * dy[part, :, None]
            if dx is not None:
                dx[part].scatter_add_(1, index.flatten(1), s.flatten(1))
            if dw is not None:
                dw.view(-1).index_add_(0, (index + rows).reshape(-1), s.reshape(-1), alpha=-1)
        return dx, dw, None


def order_statistic(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """``x`` [B, I], ``w`` [O, I], ``c`` [K] with K <= I, ``c >= 0`` -> [B, O]. Differentiable in x and w.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there are more weights than coordinates.
    """
    check_operands("order_statistic", x, w)
    if c.ndim != 1 or not 1 <= len(c) <= x.shape[1] or c.dtype != x.dtype:
        raise ValueError(
            f"order_statistic: expected 1..{x.shape[1]} weights of {x.dtype}, got {tuple(c.shape)} of {c.dtype}"
        )
    y: Tensor = _OrderStatistic.apply(x, w, c)
    return y
