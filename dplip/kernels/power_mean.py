# SPDX-License-Identifier: Apache-2.0
"""Power-mean distance: ``y[b, o] = (mean_i |x_bi - w_oi|^p)^(1/p) = I^(-1/p) ||x_b - w_o||_p``, p >= 2.

The row of the Jacobian is ``r = I^(-1/p) sign(t) (|t| / ||t||_p)^(p-1)`` with ``t = x - w``; its l_1 norm is
at most 1 for every p, which is why this normalisation, not the plain l_p distance, is trained with.
Values are normalised by the largest entry first, so p = 1000 neither over- nor underflows, and ``t = 0``
has the subgradient 0, as has every row of differences whose norm is below the smallest normal number.

Half precision is computed in float32; only the result is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dplip.kernels.power_mean_blocked  # noqa: F401  registers the CPU path
from dplip.kernels.dispatch import register, register_triton, select
from dplip.kernels.distance import blocks, check_operands, wide
from dplip.kernels.folding import fold, gradient_of, sample_by_sample, unfold
from dplip.kernels.power_mean_interval import power_mean_interval
from dplip.kernels.powers import check_exponent, mean_power, row_power

__all__ = [
    "power_mean",
    "power_mean_ghost_norm",
    "power_mean_interval",
    "power_mean_reference",
    "power_mean_rows",
    "power_mean_weight_grad",
]


def power_mean_rows(t: Tensor, y: Tensor, p: float) -> Tensor:
    """Jacobian rows ``dy/dx`` [..., I] from differences ``t`` [..., I] and values ``y`` [...]."""
    d = t.shape[-1]
    return row_power(t, (y * d ** (1 / p)).unsqueeze(-1), p).mul_(d ** (-1 / p))


@register("power_mean", "reference")
def power_mean_reference(x: Tensor, w: Tensor, p: float) -> Tensor:
    """Values [B, O]."""
    x, w = x.to(wide(x.dtype)), w.to(wide(w.dtype))
    y = x.new_empty(x.shape[0], w.shape[0])
    for rows, t in blocks(x, w):
        y[rows] = mean_power(t.abs_(), p)
    return y


@register("power_mean_backward", "reference")
def _backward_reference(
    x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float, want_x: bool, want_w: bool
) -> tuple[Tensor, Tensor]:
    x, w = x.to(wide(x.dtype)), w.to(wide(w.dtype))
    dx, dw = x.new_zeros(x.shape if want_x else 0), w.new_zeros(w.shape if want_w else 0)
    for rows, t in blocks(x, w):
        s = power_mean_rows(t, y[rows], p).mul_(dy[rows].unsqueeze(-1))
        if want_x:
            dx[rows] = s.sum(1)
        if want_w:
            dw -= s.sum(0)
    return dx, dw


@register("power_mean_weight_grad", "reference")
def _weight_grad_reference(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    return power_mean_rows(x.to(y.dtype)[:, None] - w.to(y.dtype), y, p).mul_(-dy.unsqueeze(-1))


@register("power_mean_ghost_norm", "reference")
def _ghost_norm_reference(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    norm = torch.empty_like(y)
    for rows, t in blocks(x.to(wide(x.dtype)), w.to(wide(w.dtype))):
        norm[rows] = torch.linalg.vector_norm(power_mean_rows(t, y[rows], p), dim=-1)
    return torch.linalg.vector_norm(norm.mul_(dy), dim=1)


register_triton("power_mean", "power_mean", "forward")
register_triton("power_mean_backward", "power_mean_gradient", "backward")
register_triton("power_mean_weight_grad", "power_mean_gradient", "weight_grad")
register_triton("power_mean_ghost_norm", "power_mean_gradient", "ghost_norm")


@torch.library.custom_op("dplip::power_mean", mutates_args=())
def _forward_op(x: Tensor, w: Tensor, p: float) -> Tensor:
    y: Tensor = select("power_mean", x.device.type)(x, w, p)
    return y


@_forward_op.register_fake
def _(x: Tensor, w: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], dtype=wide(x.dtype))


@torch.library.custom_op("dplip::power_mean_backward", mutates_args=())
def _backward_op(
    x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float, want_x: bool, want_w: bool
) -> tuple[Tensor, Tensor]:
    dx, dw = select("power_mean_backward", x.device.type)(x, w, y, dy, p, want_x, want_w)
    return dx, dw


@_backward_op.register_fake
def _(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float, want_x: bool, want_w: bool) -> tuple[Tensor, Tensor]:
    return y.new_empty(x.shape if want_x else (0,)), y.new_empty(w.shape if want_w else (0,))


@torch.library.custom_op("dplip::power_mean_weight_grad", mutates_args=())
def _weight_grad_op(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    grad: Tensor = select("power_mean_weight_grad", x.device.type)(x, w, y, dy, p)
    return grad


@_weight_grad_op.register_fake
def _(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    return y.new_empty(x.shape[0], *w.shape)


@torch.library.custom_op("dplip::power_mean_ghost_norm", mutates_args=())
def _ghost_norm_op(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    norm: Tensor = select("power_mean_ghost_norm", x.device.type)(x, w, y, dy, p)
    return norm


@_ghost_norm_op.register_fake
def _(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
    return y.new_empty(x.shape[0])


class _PowerMean(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, p: float) -> Tensor:
        y: Tensor = _forward_op(x, w, p)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, ctx.p = inputs
        ctx.save_for_backward(x, w, output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, y = ctx.saved_tensors
        want_x, want_w = ctx.needs_input_grad[:2]
        dx, dw = _Backward.apply(x, w, y, dy, ctx.p, want_x, want_w)
        return dx.to(x.dtype) if want_x else None, dw.to(w.dtype) if want_w else None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor, p: float) -> tuple[Tensor, int]:
        n, (of_x, of_w, _) = info.batch_size, in_dims
        if of_x is not None and of_w is not None:
            return sample_by_sample(_PowerMean.apply, n, in_dims, (x, w, p))
        axis = 0 if of_w is None else 1
        y = _PowerMean.apply(*((fold(x, of_x, n), w) if of_w is None else (x, fold(w, of_w, n))), p)
        return unfold(y, n, axis), axis


_Gradient = gradient_of("power_mean")


class _Backward(_Gradient):
    @staticmethod
    def forward(
        x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float, want_x: bool, want_w: bool
    ) -> tuple[Tensor, Tensor]:
        dx, dw = _backward_op(x, w, y, dy, p, want_x, want_w)
        return dx, dw

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        w: Tensor,
        y: Tensor,
        dy: Tensor,
        p: float,
        want_x: bool,
        want_w: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
        n, arguments = info.batch_size, (x, w, y, dy, p, want_x, want_w)
        if in_dims[1] is not None:
            return sample_by_sample(_Backward.apply, n, in_dims, arguments)
        folded = [fold(v, d, n) for v, d in ((x, in_dims[0]), (y, in_dims[2]), (dy, in_dims[3]))]
        if want_w and len(folded[0]) != n:
            return sample_by_sample(_Backward.apply, n, in_dims, arguments)
        dx, dw = _Backward.apply(folded[0], w, *folded[1:], p, want_x, False)
        if want_w:  # of one example each: the per-example gradient
            dw = _WeightGrad.apply(folded[0], w, *folded[1:], p)
        return (unfold(dx, n) if want_x else dx, dw), (0 if want_x else None, 0 if want_w else None)


class _WeightGrad(_Gradient):
    @staticmethod
    def forward(x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float) -> Tensor:
        grad: Tensor = _weight_grad_op(x, w, y, dy, p)
        return grad

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor, y: Tensor, dy: Tensor, p: float
    ) -> tuple[Tensor, int]:
        n = info.batch_size
        if in_dims[1] is not None:
            return sample_by_sample(_WeightGrad.apply, n, in_dims, (x, w, y, dy, p))
        x, y, dy = (fold(v, d, n) for v, d in ((x, in_dims[0]), (y, in_dims[2]), (dy, in_dims[3])))
        return unfold(_WeightGrad.apply(x, w, y, dy, p), n), 0


def power_mean(x: Tensor, w: Tensor, p: float) -> Tensor:
    """``x`` [B, I], ``w`` [O, I] -> [B, O] for finite ``p >= 2``. Differentiable in x and w, once.

    Half precision is computed and returned in float32.

    Raises:
        ValueError: operands do not fit, or ``p`` is below 2 or not finite.
        NotImplementedError: a second derivative is asked for.
    """
    check_operands("power_mean", x, w)
    check_exponent("power_mean", p)
    y: Tensor = _PowerMean.apply(x, w, float(p))
    return y


@torch.no_grad()
def power_mean_weight_grad(x: Tensor, w: Tensor, p: float, dy: Tensor) -> Tensor:
    """Each example's gradient in ``w`` for cotangents ``dy`` [B, O]: [B, O, I]."""
    check_operands("power_mean_weight_grad", x, w)
    check_exponent("power_mean_weight_grad", p)
    y = _forward_op(x, w, float(p))
    grad: Tensor = _weight_grad_op(x, w, y, dy.to(y.dtype), float(p))
    return grad


@torch.no_grad()
def power_mean_ghost_norm(x: Tensor, w: Tensor, p: float, dy: Tensor) -> Tensor:
    """The l_2 norm [B] of :func:`power_mean_weight_grad`, which is not formed."""
    check_operands("power_mean_ghost_norm", x, w)
    check_exponent("power_mean_ghost_norm", p)
    y = _forward_op(x, w, float(p))
    norm: Tensor = _ghost_norm_op(x, w, y, dy.to(y.dtype), float(p))
    return norm
