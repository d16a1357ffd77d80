# SPDX-License-Identifier: Apache-2.0
"""How operators meet ``torch.func.vmap``: the mapped axis joins the batch, or samples run one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["fold", "gradient_of", "sample_by_sample", "unfold", "unfold_needed"]


def fold(v: Tensor, dim: int | None, n: int, axis: int = 0) -> Tensor:
    """``v`` with its mapped axis ``dim`` (None: the same for all ``n`` samples) merged into ``axis``, outermost."""
    v = v.expand(n, *v.shape) if dim is None else v.movedim(dim, 0)
    return v.movedim(0, axis).flatten(axis, axis + 1)


def unfold(v: Tensor, n: int, axis: int = 0) -> Tensor:
    """The inverse of :func:`fold`: the mapped axis back, at ``axis``."""
    return v.unflatten(axis, (n, v.shape[axis] // n if n else 0))


def unfold_needed(
    grads: Sequence[Tensor], need: Sequence[bool], n: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """What ``vmap`` returns for folded gradients, of which those that are not needed are empty and not mapped."""
    mapped = tuple(unfold(g, n) if wanted else g for g, wanted in zip(grads, need, strict=True))
    return mapped, tuple(0 if wanted else None for wanted in need)


def sample_by_sample(
    function: Callable[..., Any], n: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The loop that ``vmap`` stands for; for what no kernel maps. Returns outputs and their mapped axes.

    Raises:
        ValueError: ``n`` is 0.
    """
    if n == 0:
        raise ValueError("vmap: expected at least one sample where weights are mapped too, got none; skip the call")
    results = [
        function(*(v if d is None else v.select(d, i) for v, d in zip(arguments, in_dims, strict=True)))
        for i in range(n)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])


def gradient_of(operator: str) -> type[torch.autograd.Function]:
    """Base of the Functions that compute gradients of ``operator``: kernels give no gradients of gradients."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Any) -> None:
            raise NotImplementedError(
                f"{operator}: expected one derivative, got a second; use the operator's reference under torch.autograd"
            )

    return Gradient
