# SPDX-License-Identifier: Apache-2.0
"""Exact range of order-statistic distances over a box, with one credited coordinate per order statistic and end.

``|x_i - w_i|`` over ``l_i <= x_i <= u_i`` ranges over ``[max(l_i - w_i, w_i - u_i, 0), max(w_i - l_i, u_i - w_i)]``,
independently per coordinate, and order statistics are monotone in every coordinate. So the range of
``sum_k c_k |x - w_o|_(k)`` is given by the K largest of either end. Each of them depends on one entry of ``l`` or ``u``
only: a row of the Jacobian of ``low``, and one of ``high``, is a signed arrangement of ``c`` spread over ``(l, u)``, so
its l_1 norm is at most ``sum c``, at ties too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dplip.errors import UnsoundCertificate
from dplip.kernels.dispatch import register, register_triton, select
from dplip.kernels.distance import blocks, check_box, gather_differences, row_blocks, tiles, wide
from dplip.kernels.folding import fold, gradient_of, sample_by_sample, unfold, unfold_needed
from dplip.kernels.largest import largest, largest_reference
from dplip.kernels.order_statistic import check_weights

__all__ = ["order_statistic_interval", "order_statistic_interval_reference"]

_SCATTER_ELEMENTS = 1 << 20
Ends = tuple[Tensor, Tensor, Tensor, Tensor]


@register("order_statistic_interval", "blocked", frozenset({"cpu"}))
def _blocked(lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, with_index: bool) -> Ends:
    return _forward(lower, upper, w, c, with_index, fast=True)


@register("order_statistic_interval", "reference")
def order_statistic_interval_reference(
    lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, with_index: bool = True
) -> Ends:
    """``low``, ``high`` [B, O] and int32 indices [B, O, K] of the coordinates that attain them."""
    return _forward(lower, upper, w, c, with_index, fast=False)


def _forward(lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, with_index: bool, fast: bool) -> Ends:
    lower, upper, w = (v.to(wide(v.dtype)) for v in (lower, upper, w))
    shape, cut = (len(lower), len(w)), tiles if fast else blocks
    low, high = lower.new_empty(shape), lower.new_empty(shape)
    of_index = (*shape, len(c)) if with_index else (0,)
    at_low, at_high = (torch.empty(of_index, dtype=torch.int32, device=w.device) for _ in range(2))
    spare = None
    for (rows, below), (_, above) in zip(cut(lower, w), cut(upper, w), strict=True):
        spare = torch.empty_like(below) if spare is None else spare
        near = torch.maximum(below, above.neg_(), out=spare[: len(below)]).clamp_min_(0)
        far = torch.maximum(below.abs_(), above.abs_(), out=below)
        for t, y, index in ((near, low, at_low), (far, high, at_high)):
            value, at = largest(t, len(c), with_index) if fast else largest_reference(t, len(c))
            y[rows] = (value * c).sum(-1)
            if with_index:
                index[rows] = at.to(torch.int32)
    return low, high, at_low, at_high


@register("order_statistic_interval_backward", "reference")
def _backward_reference(
    lower: Tensor,
    upper: Tensor,
    w: Tensor,
    c: Tensor,
    low_index: Tensor,
    high_index: Tensor,
    dlow: Tensor,
    dhigh: Tensor,
    need_lower: bool,
    need_upper: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dlower``, ``dupper`` [B, I] and ``dw`` [O, I]. On the CPU, each entry is summed in a fixed order."""
    shapes = (lower.shape if need_lower else 0, upper.shape if need_upper else 0, w.shape if need_w else 0)
    dlower, dupper, dw = (c.new_zeros(shape) for shape in shapes)
    for rows in row_blocks(len(lower), len(w) * len(c), _SCATTER_ELEMENTS):
        for index, dy, is_high in ((low_index, dlow, False), (high_index, dhigh, True)):
            at = index[rows].long()
            below, above = (gather_differences(v[rows], w, at) for v in (lower, upper))
            by_upper = above.abs() > below.abs() if is_high else above < 0
            sign = torch.where(by_upper, above, below).sign_() if is_high else below.gt(0).to(c) - by_upper.to(c)
            s = sign.to(c) * c * dy[rows].unsqueeze(-1)
            if need_lower:
                dlower[rows].scatter_add_(1, at.flatten(1), s.masked_fill(by_upper, 0).flatten(1))
            if need_upper:
                dupper[rows].scatter_add_(1, at.flatten(1), s.masked_fill(~by_upper, 0).flatten(1))
            if need_w:
                dw.scatter_add_(1, at.transpose(0, 1).flatten(1), s.neg().transpose(0, 1).flatten(1))
    return dlower, dupper, dw


register_triton("order_statistic_interval", "order_statistic", "order_statistic_interval")
register_triton("order_statistic_interval_backward", "order_statistic", "order_statistic_interval_backward")


@torch.library.custom_op("dplip::order_statistic_interval", mutates_args=())
def _forward_op(
    lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, with_index: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low, high, low_index, high_index = select("order_statistic_interval", w.device.type)(lower, upper, w, c, with_index)
    return low, high, low_index, high_index


@_forward_op.register_fake
def _(lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, with_index: bool) -> Ends:
    shape = (lower.shape[0], w.shape[0])
    index = [w.new_empty((*shape, c.shape[0]) if with_index else (0,), dtype=torch.int32) for _ in range(2)]
    return c.new_empty(shape), c.new_empty(shape), index[0], index[1]


@torch.library.custom_op("dplip::order_statistic_interval_backward", mutates_args=())
def _backward_op(
    lower: Tensor,
    upper: Tensor,
    w: Tensor,
    c: Tensor,
    low_index: Tensor,
    high_index: Tensor,
    dlow: Tensor,
    dhigh: Tensor,
    need_lower: bool,
    need_upper: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = select("order_statistic_interval_backward", w.device.type)
    ends = (lower, upper, w, c, low_index, high_index, dlow, dhigh)
    dlower, dupper, dw = run(*ends, need_lower, need_upper, need_w)
    return dlower, dupper, dw


@_backward_op.register_fake
def _(
    lower: Tensor,
    upper: Tensor,
    w: Tensor,
    c: Tensor,
    low_index: Tensor,
    high_index: Tensor,
    dlow: Tensor,
    dhigh: Tensor,
    need_lower: bool,
    need_upper: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (lower.shape if need_lower else (0,), upper.shape if need_upper else (0,), w.shape if need_w else (0,))
    dlower, dupper, dw = (c.new_empty(shape) for shape in shapes)
    return dlower, dupper, dw


class _Interval(torch.autograd.Function):
    @staticmethod
    def forward(lower: Tensor, upper: Tensor, w: Tensor, c: Tensor, with_index: bool) -> Ends:
        low, high, low_index, high_index = _forward_op(lower, upper, w, c, with_index)
        return low, high, low_index, high_index

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Ends) -> None:
        *operands, ctx.with_index = inputs
        ctx.save_for_backward(*operands, *output[2:])
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, dlow: Tensor, dhigh: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *operands, low_index, high_index = ctx.saved_tensors
        if not ctx.with_index:
            low_index, high_index = _Interval.apply(*operands, True)[2:]
        need = ctx.needs_input_grad[:3]
        grads = _Backward.apply(*operands, low_index, high_index, dlow, dhigh, *need)
        cast = (g.to(v.dtype) if n else None for g, v, n in zip(grads, operands, need, strict=False))
        return (*cast, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        lower, upper, w, c, with_index = inputs
        n = info.batch_size
        if in_dims[2] is not None or in_dims[3] is not None:
            return sample_by_sample(_Interval.apply, n, in_dims, inputs)
        ends = _Interval.apply(fold(lower, in_dims[0], n), fold(upper, in_dims[1], n), w, c, with_index)
        if with_index:
            return tuple(unfold(v, n) for v in ends), (0, 0, 0, 0)
        return (unfold(ends[0], n), unfold(ends[1], n), *ends[2:]), (0, 0, None, None)


_Gradient = gradient_of("order_statistic_interval")


class _Backward(_Gradient):
    @staticmethod
    def forward(
        lower: Tensor,
        upper: Tensor,
        w: Tensor,
        c: Tensor,
        low_index: Tensor,
        high_index: Tensor,
        dlow: Tensor,
        dhigh: Tensor,
        need_lower: bool,
        need_upper: bool,
        need_w: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dlow, dhigh = dlow.to(c.dtype), dhigh.to(c.dtype)
        dlower, dupper, dw = _backward_op(
            lower, upper, w, c, low_index, high_index, dlow, dhigh, need_lower, need_upper, need_w
        )
        return dlower, dupper, dw

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        n, need = info.batch_size, inputs[8:]
        if in_dims[2] is not None or in_dims[3] is not None or need[2]:
            return sample_by_sample(_Backward.apply, n, in_dims, inputs)
        folded = [v if i in (2, 3) else fold(v, in_dims[i], n) for i, v in enumerate(inputs[:8])]
        grads = _Backward.apply(*folded, *need)
        return unfold_needed(grads, need, n)


def order_statistic_interval(lower: Tensor, upper: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Exact range ``(low, high)`` [B, O] of every neuron over the boxes ``lower <= x <= upper`` [B, I].

    Differentiable in ``lower``, ``upper`` and ``w`` [O, I], once. A coordinate that may meet its weight has derivative
    0 in ``low``; where both ends of it are as far from the weight, ``high`` credits the lower one.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there are more weights ``c`` [K] than coordinates.
        UnsoundCertificate: an operand is float16 or bfloat16.
        NotImplementedError: a second derivative is asked for.
    """
    for v in (lower, upper, w):
        if v.dtype in (torch.float16, torch.bfloat16):
            raise UnsoundCertificate(
                f"order_statistic_interval: expected bounds in float32 or float64, got {v.dtype}, whose rounding no "
                "bound covers; compute bounds outside autocast"
            )
    check_box("order_statistic_interval", lower, upper, w)
    c = check_weights("order_statistic_interval", w, c)
    with_index = torch.is_grad_enabled() and any(v.requires_grad for v in (lower, upper, w))
    low, high = _Interval.apply(lower, upper, w, c, with_index)[:2]
    return low, high
