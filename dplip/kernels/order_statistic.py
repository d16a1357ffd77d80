# SPDX-License-Identifier: Apache-2.0
"""Order-statistic distance: ``y[b, o] = sum_k c_k |x_b - w_o|_(k)``, ``|.|_(1) >= |.|_(2) >= ...``.

``c = (1,)`` is the l_inf distance (Zhang, Cai, Lu, He, Wang: Towards Certifying L-infinity Robustness using
Neural Networks with L-inf-dist Neurons, ICML 2021); geometric ``c`` is the sort neuron (Zhang, Jiang, He,
Wang: Rethinking Lipschitz Neural Networks and Certified Robustness: A Boolean Function Perspective, NeurIPS
2022). Only the ``K = len(c)`` largest entries are kept, each with its own index: at a tie exactly one
index is credited per order statistic, so a row of the Jacobian is always a signed permutation of ``c``.

Each raw operator ``dplip::*`` below is a plain function on tensors, without autograd, that runs the backend of
:mod:`dplip.kernels.dispatch`. Results are float32 for float16 and bfloat16 operands, ``c`` and ``dy`` too. The lowest
index is credited at a tie for ``K = 1``; for ``K > 1`` indices are distinct and in descending order of value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dplip.kernels.dispatch import register, register_triton, select
from dplip.kernels.distance import blocks, check_operands, gather_differences, row_blocks, tiles, wide
from dplip.kernels.folding import fold, gradient_of, sample_by_sample, unfold
from dplip.kernels.largest import largest, largest_reference

__all__ = [
    "check_weights",
    "order_statistic",
    "order_statistic_ghost_norm",
    "order_statistic_indices",
    "order_statistic_reference",
    "order_statistic_weight_grad",
]

_SCATTER_ELEMENTS = 1 << 21
_NO_INDEX = 0  # elements of the index where none was asked for


@register("order_statistic", "blocked", frozenset({"cpu"}))
def _blocked(x: Tensor, w: Tensor, c: Tensor, with_index: bool) -> tuple[Tensor, Tensor]:
    return _forward(x, w, c, with_index, fast=True)


@register("order_statistic", "reference")
def order_statistic_reference(x: Tensor, w: Tensor, c: Tensor, with_index: bool = True) -> tuple[Tensor, Tensor]:
    """Values [B, O] and the int32 indices [B, O, K] of the K largest ``|x - w|``, in descending order."""
    return _forward(x, w, c, with_index, fast=False)


def _forward(x: Tensor, w: Tensor, c: Tensor, with_index: bool, fast: bool) -> tuple[Tensor, Tensor]:
    x, w, k = x.to(wide(x.dtype)), w.to(wide(w.dtype)), len(c)
    y = x.new_empty(len(x), len(w))
    index = torch.empty((*y.shape, k) if with_index else _NO_INDEX, dtype=torch.int32, device=x.device)
    for rows, t in (tiles if fast else blocks)(x, w):
        value, at = largest(t.abs_(), k, with_index) if fast else largest_reference(t.abs_(), k)
        y[rows] = (value * c).sum(-1)  # not a matrix product, which TF32 or autocast could round
        if with_index:
            index[rows] = at.to(torch.int32)
    return y, index


def _signed(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
    """``dy_bo`` times the entries of the row of the Jacobian in x: [B, O, K]; where x and w meet, the subgradient 0."""
    return gather_differences(x, w, index).sign_().to(c.dtype) * c * dy.unsqueeze(-1)


@register("order_statistic_backward", "reference")
def _backward_reference(
    x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor]:
    """``dx`` [B, I] and ``dw`` [O, I]. On the CPU, each entry is summed in the order of examples and of outputs."""
    dx = c.new_zeros(x.shape if need_x else 0)
    dw = c.new_zeros(w.shape if need_w else 0)
    for rows in row_blocks(len(x), len(w) * len(c), _SCATTER_ELEMENTS):
        at = index[rows].long()
        s = _signed(x[rows], w, c, at, dy[rows])
        if need_x:
            dx[rows].scatter_add_(1, at.flatten(1), s.flatten(1))
        if need_w:
            dw.scatter_add_(1, at.transpose(0, 1).flatten(1), s.neg_().transpose(0, 1).flatten(1))
    return dx, dw


@register("order_statistic_weight_grad", "reference")
def _weight_grad_reference(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
    at = index.long()
    return c.new_zeros(len(x), *w.shape).scatter_(2, at, _signed(x, w, c, at, dy).neg_())


@register("order_statistic_ghost_norm", "reference")
def _ghost_norm_reference(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
    norm = c.new_empty(len(x))
    for rows in row_blocks(len(x), len(w) * len(c), _SCATTER_ELEMENTS):
        s = _signed(x[rows], w, c, index[rows].long(), dy[rows])
        norm[rows] = torch.linalg.vector_norm(s.flatten(1), dim=1)
    return norm


register_triton("order_statistic", "order_statistic", "order_statistic")
register_triton("order_statistic_backward", "order_statistic", "order_statistic_backward")
register_triton("order_statistic_weight_grad", "order_statistic", "order_statistic_weight_grad")


@torch.library.custom_op("dplip::order_statistic", mutates_args=())
def _forward_op(x: Tensor, w: Tensor, c: Tensor, with_index: bool) -> tuple[Tensor, Tensor]:
    y, index = select("order_statistic", x.device.type)(x, w, c, with_index)
    return y, index


@_forward_op.register_fake
def _(x: Tensor, w: Tensor, c: Tensor, with_index: bool) -> tuple[Tensor, Tensor]:
    b, o = x.shape[0], w.shape[0]
    shape = (b, o, c.shape[0]) if with_index else (_NO_INDEX,)
    return c.new_empty(b, o), x.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("dplip::order_statistic_backward", mutates_args=())
def _backward_op(
    x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor]:
    dx, dw = select("order_statistic_backward", x.device.type)(x, w, c, index, dy, need_x, need_w)
    return dx, dw


@_backward_op.register_fake
def _(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor, Tensor]:
    return c.new_empty(x.shape if need_x else (0,)), c.new_empty(w.shape if need_w else (0,))


@torch.library.custom_op("dplip::order_statistic_weight_grad", mutates_args=())
def _weight_grad_op(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
    grad: Tensor = select("order_statistic_weight_grad", x.device.type)(x, w, c, index, dy)
    return grad


@_weight_grad_op.register_fake
def _(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
    return c.new_empty(x.shape[0], *w.shape)


@torch.library.custom_op("dplip::order_statistic_ghost_norm", mutates_args=())
def _ghost_norm_op(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
    norm: Tensor = select("order_statistic_ghost_norm", x.device.type)(x, w, c, index, dy)
    return norm


@_ghost_norm_op.register_fake
def _(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
    return c.new_empty(x.shape[0])


class _OrderStatistic(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor, c: Tensor, with_index: bool, low: torch.dtype | None) -> tuple[Tensor, Tensor]:
        # Outside the raw operator, where a watcher of dtypes sees it.
        operands = (x, w) if low is None else (x.to(low), w.to(low))
        y, index = _forward_op(*operands, c, with_index)
        return y, index

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, c, ctx.with_index, ctx.low = inputs
        ctx.save_for_backward(x, w, c, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, w, c, index = ctx.saved_tensors
        if not ctx.with_index:
            index = _OrderStatistic.apply(x, w, c, True, ctx.low)[1]
        need_x, need_w = ctx.needs_input_grad[:2]
        dx, dw = _Backward.apply(x, w, c, index, dy, need_x, need_w)
        return dx.to(x.dtype) if need_x else None, dw.to(w.dtype) if need_w else None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        w: Tensor,
        c: Tensor,
        with_index: bool,
        low: torch.dtype | None,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
        n, (of_x, of_w, of_c, *_) = info.batch_size, in_dims
        if of_c is not None or (of_x is not None and of_w is not None):
            return sample_by_sample(_OrderStatistic.apply, n, in_dims, (x, w, c, with_index, low))
        axis = 0 if of_w is None else 1
        operands = (fold(x, of_x, n), w) if of_w is None else (x, fold(w, of_w, n))
        y, index = _OrderStatistic.apply(*operands, c, with_index, low)
        if with_index:
            return (unfold(y, n, axis), unfold(index, n, axis)), (axis, axis)
        return (unfold(y, n, axis), index), (axis, None)


_Gradient = gradient_of("order_statistic")


class _Backward(_Gradient):
    @staticmethod
    def forward(
        x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor, need_x: bool, need_w: bool
    ) -> tuple[Tensor, Tensor]:
        dx, dw = _backward_op(x, w, c, index, dy.to(c.dtype), need_x, need_w)
        return dx, dw

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        w: Tensor,
        c: Tensor,
        index: Tensor,
        dy: Tensor,
        need_x: bool,
        need_w: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
        n, arguments = info.batch_size, (x, w, c, index, dy, need_x, need_w)
        if in_dims[1] is not None or in_dims[2] is not None:
            return sample_by_sample(_Backward.apply, n, in_dims, arguments)
        folded = [fold(v, d, n) for v, d in ((x, in_dims[0]), (index, in_dims[3]), (dy, in_dims[4]))]
        one_each = len(folded[0]) == n
        if need_w and not one_each:
            return sample_by_sample(_Backward.apply, n, in_dims, arguments)
        dx, dw = _Backward.apply(folded[0], w, c, *folded[1:], need_x, False)
        if need_w:  # of one example each: the per-example gradient
            dw = _WeightGrad.apply(folded[0], w, c, *folded[1:])
        return (unfold(dx, n) if need_x else dx, dw), (0 if need_x else None, 0 if need_w else None)


class _WeightGrad(_Gradient):
    @staticmethod
    def forward(x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor) -> Tensor:
        grad: Tensor = _weight_grad_op(x, w, c, index, dy.to(c.dtype))
        return grad

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, w: Tensor, c: Tensor, index: Tensor, dy: Tensor
    ) -> tuple[Tensor, int]:
        n = info.batch_size
        if in_dims[1] is not None or in_dims[2] is not None:
            return sample_by_sample(_WeightGrad.apply, n, in_dims, (x, w, c, index, dy))
        x, index, dy = (fold(v, d, n) for v, d in ((x, in_dims[0]), (index, in_dims[3]), (dy, in_dims[4])))
        return unfold(_WeightGrad.apply(x, w, c, index, dy), n), 0


def check_weights(operator: str, x: Tensor, c: Tensor) -> Tensor:
    """``c`` in the dtype of results; raise ``ValueError`` unless it holds 1 to I weights of it or of that of ``x``."""
    if c.ndim != 1 or not 1 <= len(c) <= x.shape[1] or c.dtype not in (x.dtype, wide(x.dtype)):
        raise ValueError(
            f"{operator}: expected 1..{x.shape[1]} weights of {wide(x.dtype)}, got {tuple(c.shape)} of {c.dtype}"
        )
    return c.to(wide(x.dtype))


def order_statistic(x: Tensor, w: Tensor, c: Tensor, low: torch.dtype | None = None) -> Tensor:
    """``x`` [B, I], ``w`` [O, I], ``c`` [K] with K <= I, ``c >= 0`` -> [B, O] in the dtype of ``c``.

    Differentiable in x and w, once.

    With ``low`` (float16 or bfloat16) values and indices are those of the operands rounded to it, and float16 kernels
    may round differences too; ``x`` and ``w`` themselves stay as they are for the backward pass, whose sums are float32
    or wider. A row of the Jacobian is a signed arrangement of ``c`` whichever indices are credited, so every bound on
    gradients holds as it is; only values move, by up to ``u (|x_i| + |w_i| + |x_i - w_i|)`` each, ``u`` = 2^-11 or
    2^-8.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or there are more weights than coordinates.
        NotImplementedError: a second derivative is asked for.
    """
    check_operands("order_statistic", x, w)
    weights = check_weights("order_statistic", x, c)
    if low not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"order_statistic: expected low None, float16 or bfloat16, got {low}")
    with_index = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    y: Tensor = _OrderStatistic.apply(x, w, weights, with_index, low)[0]
    return y.to(c.dtype)


@torch.no_grad()
def order_statistic_indices(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The credited coordinates [B, O, K] (int64): where the K largest ``|x_b - w_o|`` sit."""
    check_operands("order_statistic", x, w)
    index: Tensor = _forward_op(x, w, check_weights("order_statistic", x, c), True)[1]
    return index.long()


@torch.no_grad()
def order_statistic_weight_grad(x: Tensor, w: Tensor, c: Tensor, dy: Tensor) -> Tensor:
    """Each example's gradient in ``w`` for cotangents ``dy`` [B, O]: [B, O, I]."""
    check_operands("order_statistic_weight_grad", x, w)
    c = check_weights("order_statistic_weight_grad", x, c)
    grad: Tensor = _weight_grad_op(x, w, c, _forward_op(x, w, c, True)[1], dy.to(c.dtype))
    return grad


@torch.no_grad()
def order_statistic_ghost_norm(x: Tensor, w: Tensor, c: Tensor, dy: Tensor) -> Tensor:
    """The l_2 norm [B] of :func:`order_statistic_weight_grad`, which is not formed.

    It is at most ``||c||_2 ||dy_b||_2``, and equal to it where no credited coordinate has ``x_bi = w_oi``.
    """
    check_operands("order_statistic_ghost_norm", x, w)
    c = check_weights("order_statistic_ghost_norm", x, c)
    norm: Tensor = _ghost_norm_op(x, w, c, _forward_op(x, w, c, True)[1], dy.to(c.dtype))
    return norm
