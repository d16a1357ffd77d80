# SPDX-License-Identifier: Apache-2.0
"""Linear splines on a uniform grid: ``y[b, c, s] = phi_c(x[b, c, s])``.

``phi_c`` interpolates ``coefficients[c, 0..K]`` at ``K + 1`` knots from ``-reach`` to ``reach``, and continues
outside with fixed slopes ``end_slopes[c]`` (left, right), or constantly where they are None. So the gradient with
respect to the coefficients is a convex combination of two unit vectors at every input, however far away. Exactly one
of grid and end counts for the derivative in ``x``, at and within rounding of ``+-reach`` too: two slopes are never
added there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dplip.kernels.dispatch import register, register_triton, select
from dplip.kernels.folding import fold, sample_by_sample, unfold

__all__ = ["linear_spline", "linear_spline_coefficient_grad", "linear_spline_reference", "locate"]


def locate(x: Tensor, reach: float, intervals: int) -> tuple[Tensor, Tensor]:
    """Interval index (int64, in ``0..K-1``) and fraction (in [0, 1]) of every input.

    The index is clamped after rounding, so neither an input outside the grid nor a rounding error at a knot
    can ever read a neighbouring channel's coefficients. The fraction's derivative in ``x`` is that of a point of the
    grid wherever ``|x| <= reach``, and 0 beyond.
    """
    t = (x.clamp(-reach, reach) + reach) * (intervals / (2 * reach))
    index = t.detach().floor().nan_to_num(0).clamp(0, intervals - 1)
    fraction = t - index  # NaN stays
    return index.long(), fraction + (fraction.clamp(0, 1) - fraction).detach()


def _corners(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Entries ``index[b, c, s]`` of ``table`` [C, K + 1] or [B, C, K + 1], and their right neighbours."""
    table = table.expand(len(index), -1, -1)
    return table.gather(2, index), table.gather(2, index + 1)


register_triton("linear_spline", "linear_spline", "forward")
register_triton("linear_spline_backward", "linear_spline", "backward")
register_triton("linear_spline_coefficient_grad", "linear_spline", "coefficient_grad")


@register("linear_spline", "reference")
def linear_spline_reference(x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> Tensor:
    """Truth and CPU path; differentiable by autograd in ``x`` and ``coefficients``."""
    index, fraction = locate(x, reach, coefficients.shape[1] - 1)
    left, right = _corners(coefficients, index)
    y = left + (right - left) * fraction
    if end_slopes is None:
        return y
    low, high = end_slopes[:, :1], end_slopes[:, 1:]
    below, above = low * (-reach - x).relu(), high * (x - reach).relu()
    # A slope of 0 times an infinite distance is 0.
    return y + torch.where(high == 0, 0, above) - torch.where(low == 0, 0, below)


def _slope(x: Tensor, index: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> Tensor:
    """``phi_c'(x)`` for ``x`` in interval ``index``: of the grid at ``+-reach``."""
    slope = (coefficients.diff(dim=1) * ((coefficients.shape[1] - 1) / (2 * reach))).expand(len(x), -1, -1)
    slope = slope.gather(2, index)
    low, high = (0, 0) if end_slopes is None else (end_slopes[:, :1], end_slopes[:, 1:])
    return torch.where(x < -reach, low, torch.where(x > reach, high, slope))


@register("linear_spline_backward", "reference")
def linear_spline_backward_reference(
    x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None, dy: Tensor, need_x: bool, need_c: bool
) -> tuple[Tensor, Tensor]:
    """``dx`` [B, C, S] and ``dc`` [C, K + 1]. On the CPU, each entry is summed in a fixed order."""
    knots = coefficients.shape[1]
    index, fraction = locate(x, reach, knots - 1)
    dx = _slope(x, index, coefficients, reach, end_slopes) * dy if need_x else x.new_empty(0)
    if not need_c:
        return dx, x.new_empty(0)
    right = dy * fraction
    left = dy * (1 - fraction)
    if x.shape[2] >= knots:  # no larger than the input
        grad = x.new_zeros(*x.shape[:2], knots).scatter_add_(2, index, left).scatter_add_(2, index + 1, right)
        return dx, grad.sum(0)
    rows = index.transpose(0, 1).flatten(1)
    left, right = left.transpose(0, 1).flatten(1), right.transpose(0, 1).flatten(1)
    dc = torch.zeros_like(coefficients).scatter_add_(1, rows, left).scatter_add_(1, rows + 1, right)
    return dx, dc


@register("linear_spline_coefficient_grad", "reference")
def linear_spline_coefficient_grad_reference(x: Tensor, knots: int, reach: float, dy: Tensor) -> Tensor:
    index, fraction = locate(x, reach, knots - 1)
    grad = x.new_zeros(*x.shape[:2], knots)
    return grad.scatter_add_(2, index, dy * (1 - fraction)).scatter_add_(2, index + 1, dy * fraction)


@torch.library.custom_op("dplip::linear_spline", mutates_args=())
def _forward_op(x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> Tensor:
    y: Tensor = select("linear_spline", x.device.type)(x, coefficients, reach, end_slopes)
    return y


@_forward_op.register_fake
def _(x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dplip::linear_spline_backward", mutates_args=())
def _backward_op(
    x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None, dy: Tensor, need_x: bool, need_c: bool
) -> tuple[Tensor, Tensor]:
    run = select("linear_spline_backward", x.device.type)
    dx, dc = run(x, coefficients, reach, end_slopes, dy, need_x, need_c)
    return dx, dc


@_backward_op.register_fake
def _(
    x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None, dy: Tensor, need_x: bool, need_c: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), x.new_empty(coefficients.shape if need_c else (0,))


@torch.library.custom_op("dplip::linear_spline_coefficient_grad", mutates_args=())
def _coefficient_grad_op(x: Tensor, knots: int, reach: float, dy: Tensor) -> Tensor:
    grad: Tensor = select("linear_spline_coefficient_grad", x.device.type)(x, knots, reach, dy)
    return grad


@_coefficient_grad_op.register_fake
def _(x: Tensor, knots: int, reach: float, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], knots)


class _LinearSpline(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> Tensor:
        y: Tensor = _forward_op(x, coefficients, reach, end_slopes)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, coefficients, ctx.reach, end_slopes = inputs
        ctx.save_for_backward(x, coefficients, end_slopes)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, coefficients, end_slopes = ctx.saved_tensors
        need_x, need_c = ctx.needs_input_grad[:2]
        dx, dc = _Backward.apply(x, coefficients, ctx.reach, end_slopes, dy, need_x, need_c)
        return dx if need_x else None, dc if need_c else None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, coefficients: Tensor, reach: float, ends: Tensor | None
    ) -> tuple[Tensor, int]:
        n = info.batch_size
        if in_dims[1] is not None or in_dims[3] is not None:
            return sample_by_sample(_LinearSpline.apply, n, in_dims, (x, coefficients, reach, ends))
        return unfold(_LinearSpline.apply(fold(x, in_dims[0], n), coefficients, reach, ends), n), 0


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None, dy: Tensor, need_x: bool, need_c: bool
    ) -> tuple[Tensor, Tensor]:
        dx, dc = _backward_op(x, coefficients, reach, end_slopes, dy, need_x, need_c)
        return dx, dc

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, coefficients, ctx.reach, end_slopes, dy, ctx.need_x, ctx.need_c = inputs
        ctx.save_for_backward(x, coefficients, end_slopes, dy)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor, ddc: Tensor) -> tuple[Tensor | None, ...]:
        """In plain torch: ``dx = phi'(x) dy`` and ``dc = (1 - f) dy e_k + f dy e_{k+1}``, with ``f' = phi' = 0`` beyond
        the grid as far as ``x`` and the coefficients go."""
        x, coefficients, end_slopes, dy = ctx.saved_tensors
        per_unit = (coefficients.shape[1] - 1) / (2 * ctx.reach)
        index, fraction = locate(x, ctx.reach, coefficients.shape[1] - 1)
        inside = (x.abs() <= ctx.reach).to(x.dtype) * per_unit
        at_x, at_c, at_dy = torch.zeros_like(x), torch.zeros_like(coefficients), torch.zeros_like(dy)
        if ctx.need_x:
            at_dy = at_dy + ddx * _slope(x, index, coefficients, ctx.reach, end_slopes)
            rise = (ddx * dy * inside).transpose(0, 1).flatten(1)
            rows = index.transpose(0, 1).flatten(1)
            at_c = at_c.scatter_add(1, rows + 1, rise).scatter_add(1, rows, -rise)
        if ctx.need_c:
            left, right = _corners(ddc, index)
            at_dy = at_dy + left + (right - left) * fraction
            at_x = at_x + dy * (right - left) * inside
        return at_x, at_c, None, None, at_dy, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        x, coefficients, reach, end_slopes, dy, need_x, need_c = inputs
        n = info.batch_size
        if in_dims[1] is not None or in_dims[3] is not None:
            return sample_by_sample(_Backward.apply, n, in_dims, inputs)
        x, dy = fold(x, in_dims[0], n), fold(dy, in_dims[4], n)
        if need_c and len(x) != n:
            return sample_by_sample(_Backward.apply, n, in_dims, inputs)
        dx, dc = _Backward.apply(x, coefficients, reach, end_slopes, dy, need_x, False)
        if need_c:  # of one example each: the per-example gradient
            dc = _CoefficientGrad.apply(x, coefficients.shape[1], reach, dy)
        return (unfold(dx, n) if need_x else dx, dc), (0 if need_x else None, 0 if need_c else None)


class _CoefficientGrad(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, knots: int, reach: float, dy: Tensor) -> Tensor:
        grad: Tensor = _coefficient_grad_op(x, knots, reach, dy)
        return grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.knots, ctx.reach, dy = inputs
        ctx.save_for_backward(x, dy)

    @staticmethod
    def backward(ctx: Any, dgrad: Tensor) -> tuple[Tensor, None, None, Tensor]:
        x, dy = ctx.saved_tensors
        index, fraction = locate(x, ctx.reach, ctx.knots - 1)
        left, right = _corners(dgrad, index)
        inside = (x.abs() <= ctx.reach).to(x.dtype) * ((ctx.knots - 1) / (2 * ctx.reach))
        return dy * (right - left) * inside, None, None, left + (right - left) * fraction

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, knots: int, reach: float, dy: Tensor
    ) -> tuple[Tensor, int]:
        x, dy = fold(x, in_dims[0], info.batch_size), fold(dy, in_dims[3], info.batch_size)
        return unfold(_CoefficientGrad.apply(x, knots, reach, dy), info.batch_size), 0


def _check(x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> None:
    if x.ndim != 3 or coefficients.ndim != 2 or x.shape[1] != coefficients.shape[0]:
        raise ValueError(
            "linear_spline: expected x [B, C, S] and coefficients [C, K + 1], "
            f"got {tuple(x.shape)} and {tuple(coefficients.shape)}"
        )
    if coefficients.shape[1] < 2 or not reach > 0 or x.dtype != coefficients.dtype:
        raise ValueError(
            "linear_spline: expected two or more knots, reach > 0 and one dtype, "
            f"got {coefficients.shape[1]}, {reach}, {x.dtype} and {coefficients.dtype}"
        )
    if end_slopes is not None and (end_slopes.shape != (len(coefficients), 2) or end_slopes.dtype != x.dtype):
        raise ValueError(
            f"linear_spline: expected end_slopes [{len(coefficients)}, 2] of {x.dtype}, "
            f"got {tuple(end_slopes.shape)} of {end_slopes.dtype}"
        )


def linear_spline(x: Tensor, coefficients: Tensor, reach: float, end_slopes: Tensor | None) -> Tensor:
    """``x`` [B, C, S], ``coefficients`` [C, K + 1], ``end_slopes`` [C, 2] or None -> [B, C, S].

    Differentiable in ``x`` and ``coefficients``, twice. The derivative at a knot is that of the interval to its right,
    and that of the grid at ``+-reach``.

    Raises:
        ValueError: shapes or dtypes do not fit, fewer than two knots, or ``reach`` is not positive.
    """
    _check(x, coefficients, reach, end_slopes)
    y: Tensor = _LinearSpline.apply(x, coefficients, reach, end_slopes)
    return y


@torch.no_grad()
def linear_spline_coefficient_grad(x: Tensor, knots: int, reach: float, dy: Tensor) -> Tensor:
    """Each example's gradient in the coefficients for cotangents ``dy`` [B, C, S]: [B, C, knots]."""
    grad: Tensor = _coefficient_grad_op(x, knots, reach, dy)
    return grad
