# SPDX-License-Identifier: Apache-2.0
"""Exact range of the power-mean distance over a box.

``|x_i - w_i|`` over ``l_i <= x_i <= u_i`` ranges over ``[max(l_i - w_i, w_i - u_i, 0), max(w_i - l_i, u_i - w_i)]``,
independently per coordinate, and the power mean is monotone in each. So both ends are power means of differences from
one point of the box, each coordinate of which is one entry of ``l`` or ``u``: a row of the Jacobian of ``low``, and one
of ``high``, is a row of the power mean's spread over ``(l, u)``, with an l_1 norm of at most 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dplip.kernels.dispatch import register, register_triton, select
from dplip.kernels.distance import blocks, check_box, tiles, wide
from dplip.kernels.folding import fold, gradient_of, sample_by_sample, unfold, unfold_needed
from dplip.kernels.power_mean_blocked import relative_mean
from dplip.kernels.powers import check_exponent, mean_power, row_power

__all__ = ["power_mean_interval", "power_mean_interval_reference"]


@register("power_mean_interval", "blocked", frozenset({"cpu"}))
def _blocked(lower: Tensor, upper: Tensor, w: Tensor, p: float) -> tuple[Tensor, Tensor]:
    lower, upper, w = (v.to(wide(v.dtype)) for v in (lower, upper, w))
    low, high = (lower.new_empty(len(lower), len(w)) for _ in range(2))
    for (rows, below), (_, above) in zip(tiles(lower, w), tiles(upper, w), strict=True):
        near = torch.maximum(below, -above).clamp_min_(0)
        low[rows] = relative_mean(near, p)
        high[rows] = relative_mean(torch.maximum(below.abs_(), above.abs_(), out=near), p)
    return low, high


@register("power_mean_interval", "reference")
def power_mean_interval_reference(lower: Tensor, upper: Tensor, w: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """``low`` and ``high`` [B, O]."""
    lower, upper, w = (v.to(wide(v.dtype)) for v in (lower, upper, w))
    low, high = (lower.new_empty(len(lower), len(w)) for _ in range(2))
    for (rows, below), (_, above) in zip(blocks(lower, w), blocks(upper, w), strict=True):
        low[rows] = mean_power(torch.maximum(below, -above).clamp_min_(0), p)
        high[rows] = mean_power(torch.maximum(below.abs_(), above.abs_()), p)
    return low, high


@register("power_mean_interval_backward", "reference")
def _backward_reference(
    lower: Tensor,
    upper: Tensor,
    w: Tensor,
    low: Tensor,
    high: Tensor,
    dlow: Tensor,
    dhigh: Tensor,
    p: float,
    need_lower: bool,
    need_upper: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dlower``, ``dupper`` [B, I] and ``dw`` [O, I]."""
    lower, upper, w = (v.to(wide(v.dtype)) for v in (lower, upper, w))
    dlower, dupper, dw = (
        v.new_zeros(v.shape if need else 0) for v, need in ((lower, need_lower), (upper, need_upper), (w, need_w))
    )
    d = w.shape[1]
    for (rows, below), (_, above) in zip(blocks(lower, w), blocks(upper, w), strict=True):
        near_upper = above < -below.clamp_min(0)
        near = torch.where(near_upper, above, below.clamp_min(0))
        far_upper = above.abs() > below.abs()
        far = torch.where(far_upper, above, below)
        for t, by_upper, y, dy in ((near, near_upper, low, dlow), (far, far_upper, high, dhigh)):
            norm = (y[rows] * d ** (1 / p)).unsqueeze(-1)
            s = row_power(t, norm, p).mul_((dy[rows] * d ** (-1 / p)).unsqueeze(-1))
            if need_lower:
                dlower[rows] += s.masked_fill(by_upper, 0).sum(1)
            if need_upper:
                dupper[rows] += s.masked_fill(~by_upper, 0).sum(1)
            if need_w:
                dw -= s.sum(0)
    return dlower, dupper, dw


register_triton("power_mean_interval", "power_mean_interval", "forward")
register_triton("power_mean_interval_backward", "power_mean_interval", "backward")


@torch.library.custom_op("dplip::power_mean_interval", mutates_args=())
def _forward_op(lower: Tensor, upper: Tensor, w: Tensor, p: float) -> tuple[Tensor, Tensor]:
    low, high = select("power_mean_interval", w.device.type)(lower, upper, w, p)
    return low, high


@_forward_op.register_fake
def _(lower: Tensor, upper: Tensor, w: Tensor, p: float) -> tuple[Tensor, Tensor]:
    shape, dtype = (lower.shape[0], w.shape[0]), wide(w.dtype)
    return w.new_empty(shape, dtype=dtype), w.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dplip::power_mean_interval_backward", mutates_args=())
def _backward_op(
    lower: Tensor,
    upper: Tensor,
    w: Tensor,
    low: Tensor,
    high: Tensor,
    dlow: Tensor,
    dhigh: Tensor,
    p: float,
    need_lower: bool,
    need_upper: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = select("power_mean_interval_backward", w.device.type)
    dlower, dupper, dw = run(lower, upper, w, low, high, dlow, dhigh, p, need_lower, need_upper, need_w)
    return dlower, dupper, dw


@_backward_op.register_fake
def _(
    lower: Tensor,
    upper: Tensor,
    w: Tensor,
    low: Tensor,
    high: Tensor,
    dlow: Tensor,
    dhigh: Tensor,
    p: float,
    need_lower: bool,
    need_upper: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (lower.shape if need_lower else (0,), upper.shape if need_upper else (0,), w.shape if need_w else (0,))
    dlower, dupper, dw = (low.new_empty(shape) for shape in shapes)
    return dlower, dupper, dw


class _Interval(torch.autograd.Function):
    @staticmethod
    def forward(lower: Tensor, upper: Tensor, w: Tensor, p: float) -> tuple[Tensor, Tensor]:
        low, high = _forward_op(lower, upper, w, p)
        return low, high

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *operands, ctx.p = inputs
        ctx.save_for_backward(*operands, *output)

    @staticmethod
    def backward(ctx: Any, dlow: Tensor, dhigh: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:3]
        grads = _Backward.apply(*ctx.saved_tensors, dlow, dhigh, ctx.p, *need)
        cast = (g.to(v.dtype) if n else None for g, v, n in zip(grads, ctx.saved_tensors, need, strict=False))
        return (*cast, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        lower, upper, w, p = inputs
        n = info.batch_size
        if in_dims[2] is not None:
            return sample_by_sample(_Interval.apply, n, in_dims, inputs)
        low, high = _Interval.apply(fold(lower, in_dims[0], n), fold(upper, in_dims[1], n), w, p)
        return (unfold(low, n), unfold(high, n)), (0, 0)


_Gradient = gradient_of("power_mean_interval")


class _Backward(_Gradient):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        dlower, dupper, dw = _backward_op(*inputs)
        return dlower, dupper, dw

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        n, need = info.batch_size, inputs[8:]
        if in_dims[2] is not None or need[2]:
            return sample_by_sample(_Backward.apply, n, in_dims, inputs)
        folded = [v if i == 2 else fold(v, in_dims[i], n) for i, v in enumerate(inputs[:7])]
        grads = _Backward.apply(*folded, *inputs[7:])
        return unfold_needed(grads, need, n)


def power_mean_interval(lower: Tensor, upper: Tensor, w: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Exact range ``(low, high)`` [B, O] of every neuron over the boxes ``lower <= x <= upper`` [B, I].

    Differentiable in ``lower``, ``upper`` and ``w`` [O, I], once. A coordinate that may meet its weight has derivative
    0 in ``low``; where both ends of it are as far from the weight, ``high`` credits the lower one.

    Raises:
        ValueError: operands do not fit, or ``p`` is below 2 or not finite.
        NotImplementedError: a second derivative is asked for.
    """
    check_box("power_mean_interval", lower, upper, w)
    check_exponent("power_mean_interval", p)
    low, high = _Interval.apply(lower, upper, w, float(p))
    return low, high
