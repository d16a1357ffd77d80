# SPDX-License-Identifier: Apache-2.0
"""Sorting of groups of channels: ``y[b, g G : (g + 1) G, s]`` is ``x[b, g G : (g + 1) G, s]`` in ascending order.

The Jacobian is a permutation, at ties too: every output credits an input of its own (Anil, Lucas, Grosse: Sorting out
Lipschitz function approximation, ICML 2019, section 4). NaN sorts last; in groups of two it makes both outputs NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dplip.kernels.dispatch import register, register_triton, select
from dplip.kernels.folding import fold, unfold

__all__ = ["group_sort", "group_sort_reference"]


register_triton("group_sort", "group_sort", "forward")
register_triton("group_sort_backward", "group_sort", "backward")


@register("group_sort", "reference")
def group_sort_reference(x: Tensor, size: int, with_index: bool) -> tuple[Tensor, Tensor]:
    """Sorted ``x`` [B, C, S], and for each entry its place in the group before, int32 (empty [0] if not asked for)."""
    groups = x.unflatten(1, (x.shape[1] // size, size))
    none = torch.empty(0, dtype=torch.int32, device=x.device)
    if size > 2:
        y, index = groups.sort(dim=2)
        return y.view(x.shape), index.to(torch.int32).view(x.shape) if with_index else none
    a, b = groups.unbind(2)
    y = torch.empty_like(groups, memory_format=torch.contiguous_format)
    torch.minimum(a, b, out=y.select(2, 0))
    torch.maximum(a, b, out=y.select(2, 1))
    if not with_index:
        return y.view(x.shape), none
    swapped = (a > b).to(torch.int32)
    return y.view(x.shape), torch.stack((swapped, 1 - swapped), 2).view(x.shape)


@register("group_sort_backward", "reference")
def group_sort_backward_reference(dy: Tensor, index: Tensor, size: int) -> Tensor:
    """``dx``: every entry of ``dy`` [B, C, S] back to where it came from."""
    groups = (dy.shape[1] // size, size)
    to, of = index.unflatten(1, groups), dy.unflatten(1, groups)
    if size > 2:
        return torch.empty_like(of, memory_format=torch.contiguous_format).scatter_(2, to.long(), of).view(dy.shape)
    swapped = to[:, :, 0].bool()
    a, b = of.unbind(2)
    return torch.stack((torch.where(swapped, b, a), torch.where(swapped, a, b)), 2).view(dy.shape)


@torch.library.custom_op("dplip::group_sort", mutates_args=())
def _forward_op(x: Tensor, size: int, with_index: bool) -> tuple[Tensor, Tensor]:
    y, index = select("group_sort", x.device.type)(x, size, with_index)
    return y, index


@_forward_op.register_fake
def _(x: Tensor, size: int, with_index: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if with_index else (0,), dtype=torch.int32)


@torch.library.custom_op("dplip::group_sort_backward", mutates_args=())
def _backward_op(dy: Tensor, index: Tensor, size: int) -> Tensor:
    dx: Tensor = select("group_sort_backward", dy.device.type)(dy, index, size)
    return dx


@_backward_op.register_fake
def _(dy: Tensor, index: Tensor, size: int) -> Tensor:
    return dy.new_empty(dy.shape)


class _GroupSort(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, size: int, with_index: bool) -> tuple[Tensor, Tensor]:
        y, index = _forward_op(x, size, with_index)
        return y, index

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.size, ctx.with_index = inputs
        ctx.save_for_backward(output[1] if ctx.with_index else x)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        index = saved if ctx.with_index else _GroupSort.apply(saved, ctx.size, True)[1]
        return _Unsort.apply(dy, index, ctx.size), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, size: int, with_index: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
        n = info.batch_size
        y, index = _GroupSort.apply(fold(x, in_dims[0], n), size, with_index)
        return (unfold(y, n), unfold(index, n) if with_index else index), (0, 0 if with_index else None)


class _Unsort(torch.autograd.Function):
    """The inverse permutation; linear in ``dy``, so its own derivative is the permutation."""

    @staticmethod
    def forward(dy: Tensor, index: Tensor, size: int) -> Tensor:
        dx: Tensor = _backward_op(dy, index, size)
        return dx

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, ctx.size = inputs
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        groups = (ddx.shape[1] // ctx.size, ctx.size)
        return ddx.unflatten(1, groups).gather(2, index.unflatten(1, groups).long()).flatten(1, 2), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], dy: Tensor, index: Tensor, size: int) -> tuple[Tensor, int]:
        n = info.batch_size
        return unfold(_Unsort.apply(fold(dy, in_dims[0], n), fold(index, in_dims[1], n), size), n), 0


def group_sort(x: Tensor, size: int) -> Tensor:
    """``x`` [B, C, S] with consecutive groups of ``size`` channels in ascending order. Differentiable.

    Raises:
        ValueError: ``x`` is not [B, C, S], or ``size`` is below 2 or does not divide C.
    """
    if x.ndim != 3 or size < 2 or x.shape[1] % size:
        raise ValueError(
            f"group_sort: expected x [B, C, S] with C divisible by a size >= 2, got {tuple(x.shape)} and {size}"
        )
    y: Tensor = _GroupSort.apply(x, size, torch.is_grad_enabled() and x.requires_grad)[0]
    return y
