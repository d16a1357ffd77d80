# SPDX-License-Identifier: Apache-2.0
"""Refuses to train in an arithmetic for which the sensitivities are not proved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from dplip.bounds import Graph
from dplip.errors import PlanError
from dplip.layers import AffineConv2d

__all__ = ["Arithmetic"]

_LOW = (torch.bfloat16, torch.float16)
_FULL = ("none", "ieee")


class Arithmetic:
    """Checks, in a training forward pass, that float32 operations are float32 operations.

    Why low precision is refused rather than covered by slack: a layer's gradient in a weight is one matrix product over
    the whole batch, and its result is rounded as a whole. One example then moves the rounded sum by up to a unit in the
    last place of the SUM, ``2^-8 ||sum||`` in bfloat16, which grows with the batch and is no multiple of that example's
    own bound (in float32 it is below ``2^-24 B`` times it, inside :data:`dplip.bounds.rounding.FLOOR`).

    Autocast is let through for a model it does not touch (layers that only select, shift, sort or clip): the traced
    model is run forward and backward under it on the reference input, and no operation may produce a half-precision
    value. It is looked at in every forward pass, since layers may change what they compute (annealed exponents).

    Args:
        graph: the traced model.
        reference: its public reference input.
    """

    def __init__(self, graph: Graph, reference: Tensor) -> None:
        self.graph, self.reference = graph, reference
        parts = [part for layer in graph.layers() for part in layer.modules()]
        self._convolves = any(isinstance(part, (AffineConv2d, _ConvNd)) for part in parts)

    def check(self, x: Tensor) -> None:
        """Raise :class:`PlanError` if a float32 model on ``x`` would compute in less than float32."""
        if self.reference.dtype != torch.float32:  # autocast and TF32 leave float64 alone
            return
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            self._check_autocast(kind, torch.get_autocast_dtype(kind))
        switch = _lowered(kind, self._convolves)
        if switch is not None:
            raise PlanError(
                f"training: expected full float32 products, got {switch}, whose rounding of a whole batch's gradient "
                "is not bounded by one example's; set it to 'ieee' (torch.set_float32_matmul_precision('highest'), "
                "torch.backends.cudnn.allow_tf32 = False)"
            )

    def _check_autocast(self, kind: str, dtype: torch.dtype) -> None:
        node = self._touched(kind, dtype)
        if node is not None:
            raise PlanError(
                f"training: expected float32 arithmetic, got autocast to {dtype} at node '{node}', where one example "
                "can move the rounded gradient of a batch by more than its bound; call the private module outside "
                "autocast (frozen features before it may stay inside)"
            )

    def _touched(self, kind: str, dtype: torch.dtype) -> str | None:
        """The first node that autocast computes in low precision; 'backward' for one in the backward pass only."""
        values = {self.graph.input: self.reference.expand(2, *self.reference.shape[1:])}
        with torch.enable_grad(), torch.autocast(kind, dtype), _Watch() as watch:
            for node in self.graph.nodes:
                values[node.name] = node.operation(*(values[i] for i in node.inputs))
                if watch.low:
                    return node.name
            output = values[self.graph.output]
            weights = [p for layer in self.graph.layers() for p in layer.parameters() if p.requires_grad]
            if weights and output.requires_grad:
                torch.autograd.grad(output.sum(), weights, allow_unused=True)
        return "backward" if watch.low else None


class _Watch(TorchDispatchMode):
    """Notes whether any operation produced a half-precision value."""

    low = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            self.low |= isinstance(value, Tensor) and value.dtype in _LOW
        return out


_PRODUCTS = {
    "cpu": (("mkldnn", "matmul"), ("mkldnn", "conv")),
    "cuda": (("cuda", "matmul"), ("cudnn", "conv")),
}


def _lowered(kind: str, convolves: bool) -> str | None:
    """The switch of torch.backends by which a float32 product is computed in TF32 or bfloat16, if one is on."""
    for name, operator in _PRODUCTS.get(kind, ()):
        if operator == "conv" and not convolves:
            continue
        backend = getattr(torch.backends, name)
        precision = getattr(getattr(backend, operator, None), "fp32_precision", None)
        if precision is None:
            precision = _before_2_9(name, operator)
        if precision not in _FULL:
            return f"torch.backends.{name}.{operator} at {precision!r}"
    return None


def _before_2_9(name: str, operator: str) -> str:
    """The same from the flags of older torch versions."""
    flags = {
        ("mkldnn", "matmul"): torch.get_float32_matmul_precision() != "highest",
        ("cuda", "matmul"): torch.backends.cuda.matmul.allow_tf32,
        ("cudnn", "conv"): torch.backends.cudnn.allow_tf32,
    }
    return "tf32" if flags.get((name, operator), False) else "ieee"
