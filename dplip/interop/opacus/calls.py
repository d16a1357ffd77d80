# SPDX-License-Identifier: Apache-2.0
"""What a layer was when it was called: Opacus asks for per-example gradients later, when it may have changed."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dplip.errors import IncompatibleModelError, NoRuleError
from dplip.layers import LipschitzLayer

__all__ = ["Call", "recall", "record"]

_OWN = frozenset(vars(nn.Module())) | {"activations"}  # of torch and of Opacus, not of the layer


@dataclass(frozen=True)
class Call:
    """One forward call: the layer as it was, the keywords it got, and its input's shape."""

    layer: LipschitzLayer
    keywords: dict[str, Any]
    shape: torch.Size

    @torch.no_grad()
    def gradients(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Per-example gradients of the layer's own parameters (not of its children's), by its own rule, in the
        parameters' type."""
        own = [name for name, _ in self.layer.named_parameters(recurse=False)]
        kind = next(self.layer.parameters(recurse=False)).dtype
        found = self.layer.per_sample_grad(x.to(kind), g.to(kind), **self.keywords)
        missing = sorted(set(own) - set(found))
        if missing:
            raise NoRuleError(
                f"{type(self.layer).__name__}.per_sample_grad: expected gradients for {sorted(own)}, "
                f"got none for {missing}; add them"
            )
        return {name: found[name] for name in own}


# Calls of each layer that wait for their backward pass. Weak: a model that is dropped takes its calls along.
_WAITING: WeakKeyDictionary[nn.Module, list[Call]] = WeakKeyDictionary()


def record(layer: LipschitzLayer, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Remember a forward call, before it runs.

    Opacus keeps a stack ``layer.activations`` of the calls it will ask about; the call is kept under the depth it will
    have there, so calls that Opacus ignores (in evaluation mode, without gradients) can never shift the count.

    Raises:
        IncompatibleModelError: the layer's rule cannot see an argument.
    """
    where = type(layer).__name__
    if len(args) != 1 or not isinstance(args[0], Tensor):
        raise IncompatibleModelError(
            f"{where}: expected one positional argument, the input tensor, got {len(args)} of types "
            f"{[type(a).__name__ for a in args]}; Opacus hands on positional tensors only, pass options by keyword"
        )
    if keywords:
        try:
            inspect.signature(layer.per_sample_grad).bind(args[0], args[0], **keywords)
        except TypeError as error:
            raise IncompatibleModelError(
                f"{where}: expected keywords that per_sample_grad takes, got {sorted(keywords)} ({error}); "
                "add them to its signature, or set them as attributes before the call"
            ) from error
    stack = _WAITING.setdefault(layer, [])
    del stack[len(getattr(layer, "activations", ())) :]
    keywords = {k: v.detach() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    stack.append(Call(_snapshot(layer), keywords, args[0].shape))


def recall(layer: LipschitzLayer, x: Tensor) -> Call:
    """The call whose activation ``x`` Opacus has just taken from its stack.

    Raises:
        IncompatibleModelError: the layer was not prepared, or Opacus rearranged its input.
    """
    stack = _WAITING.get(layer, [])
    depth = len(getattr(layer, "activations", ()))
    if len(stack) <= depth:
        raise IncompatibleModelError(
            f"{type(layer).__name__}: expected a prepared layer, got one that joined the model later; "
            "call dplip.interop.opacus.prepare(model) again before make_private"
        )
    call = stack[depth]
    del stack[depth:]
    if call.shape != x.shape:
        raise IncompatibleModelError(
            f"{type(layer).__name__}: expected the input of its forward call, {tuple(call.shape)}, got "
            f"{tuple(x.shape)} rearranged; use batch_first=True"
        )
    return call


def _snapshot(module: Any) -> Any:
    """A shallow twin: live parameters, but buffers, attributes and children of its own."""
    twin = copy.copy(module)
    state = vars(twin)
    state["_buffers"] = {k: None if b is None else b.detach().clone() for k, b in module._buffers.items()}
    state["_modules"] = {k: None if m is None else _snapshot(m) for k, m in module._modules.items()}
    for name, value in vars(module).items():
        if name in _OWN:
            continue
        if isinstance(value, Tensor):
            state[name] = value.detach().clone()
        elif isinstance(value, list | dict | set):
            state[name] = copy.copy(value)
    return twin
