# SPDX-License-Identifier: Apache-2.0
"""Norms of per-example gradients without the gradients, for Opacus' ghost clipping.

Each rule equals the norm of :meth:`dplip.layers.LipschitzLayer.per_sample_grad` of the class whose formula it mirrors,
and serves a class only while that formula is the one in force there (a subclass with its own loses the rule).

================================ ==================================================== ========================
layer                            ``||dL/dW||_2`` of one example                       work beyond the forward
================================ ==================================================== ========================
Affine, NormalizedLinear         ``||g||_2 ||x||_2``                                  O(B (I + O))
LinfDistance at p = inf          ``||g||_2``                                          O((B + O) I log)
SortLinear                       ``||g||_2 ||c||_2``                                  O((B + O) I log)
OrderStatisticLinear (fixed c)   ``||(g_o ||c_o||_2)_o||_2``                          O((B + O) I log)
LinfDistance at finite p         that of its rows, none of them kept                  that of the forward
convolutions                     as computed, a few examples at a time                that of the gradients
================================ ==================================================== ========================

Those of selections hold because one neuron's weight gradient is ``-g_o`` times a signed arrangement of ``c``, whose
signs vanish only where an input equals its weight exactly. Where any does, the rule computes the gradients instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dplip.interop.opacus.calls import Call
from dplip.layers import (
    Affine,
    AffineConv2d,
    DistanceConv2d,
    LinfDistance,
    LipschitzLayer,
    OrderStatisticLinear,
    SortLinear,
)

__all__ = ["Rule", "norm_rule"]

Rule = Callable[[Call, Tensor, Tensor], dict[str, Tensor]]

_ELEMENTS = 1 << 22  # per-example gradient entries formed at a time


def norm_rule(layer_class: type[LipschitzLayer]) -> Rule | None:
    """The rule for ``layer_class``, or None where the gradients of a whole batch are formed, one layer at a time."""
    if _inherits(layer_class, Affine, "per_sample_grad"):
        return _affine
    for convolution in (AffineConv2d, DistanceConv2d):
        if _inherits(layer_class, convolution, "per_sample_grad"):
            return _in_chunks
    for neuron in (LinfDistance, SortLinear, OrderStatisticLinear):
        names = ("per_sample_grad", "per_sample_weight_grad")
        if all(_inherits(layer_class, neuron, name) for name in names):
            return _selection
    return None


def _inherits(layer_class: type[LipschitzLayer], home: type[LipschitzLayer], name: str) -> bool:
    return issubclass(layer_class, home) and getattr(layer_class, name) is getattr(home, name)


def _affine(call: Call, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    size = _norm(g, call)
    return {"weight": size * _norm(x, call), "bias": size}


def _selection(call: Call, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    layer = call.layer
    if isinstance(layer, LinfDistance) and layer.p != float("inf"):
        with torch.no_grad():
            kind = layer.weight.dtype
            weight = layer.weight_grad_norm(x.to(kind), layer.weight, g.to(kind))
        return {"weight": weight.to(kind), "bias": _norm(g, call)}
    rows = _row_norms(call.layer)
    signed = getattr(call.layer, "magnitude", True)  # neurons that sort x - w itself have no sign to vanish
    if rows is None or (signed and _meet(x, call.layer.get_parameter("weight"))):
        return _in_chunks(call, x, g)
    return {"weight": _norm(g * rows, call), "bias": _norm(g, call)}


def _row_norms(layer: LipschitzLayer) -> Tensor | float | None:
    """l_2 norm of every neuron's ``dy_o/dw_o`` where no sign vanishes; None where it depends on the input."""
    if isinstance(layer, LinfDistance):
        return 1.0
    if isinstance(layer, SortLinear):
        return _l2(layer.order_weights.detach())
    if isinstance(layer, OrderStatisticLinear) and not layer.learned:
        return _l2(layer.order_weights.detach())
    return None


def _meet(x: Tensor, w: Tensor) -> bool:
    """Whether any ``x[b, i] == w[o, i]``: neighbours in a sorted column, one of each kind and equal."""
    value, at = torch.cat([x, w.detach().to(x.dtype)]).T.contiguous().sort(1)
    of_x = at < len(x)
    return bool(((value[:, 1:] == value[:, :-1]) & (of_x[:, 1:] != of_x[:, :-1])).any())


def _in_chunks(call: Call, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Norms of gradients that are formed for a few examples at a time and dropped."""
    entries = sum(p.numel() for p in call.layer.parameters(recurse=False))
    step = max(1, _ELEMENTS // max(1, entries))
    starts = range(0, max(1, len(x)), step)
    parts = [call.gradients(x[i : i + step], g[i : i + step]) for i in starts]
    return {name: torch.cat([_norm(part[name], call) for part in parts]) for name in parts[0]}


def _norm(v: Tensor, call: Call) -> Tensor:
    """l_2 norm of every example, [B, *] -> [B], in the type of the layer's parameters."""
    rows = v.reshape(len(v), -1) if v.numel() else v.new_zeros(len(v), 1)
    return _l2(rows.to(next(call.layer.parameters(recurse=False)).dtype))


def _l2(v: Tensor) -> Tensor:
    """l_2 norm over the last axis."""
    norm: Tensor = torch.linalg.vector_norm(v, dim=-1)
    return norm
