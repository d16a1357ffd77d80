# SPDX-License-Identifier: Apache-2.0
"""Lipschitz layers inside Opacus: every prepared layer answers with its own rule, for the call it is asked about."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping, register_grad_sampler, register_norm_sampler
from opacus.grad_sample.gsm_base import AbstractGradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn.utils._expanded_weights import ExpandedWeight
from torch.optim import Optimizer

from dplip.errors import IncompatibleModelError
from dplip.interop.opacus.calls import recall, record
from dplip.interop.opacus.constants import watch
from dplip.interop.opacus.findings import refusals
from dplip.interop.opacus.norms import norm_rule
from dplip.layers import Affine, AffineConv2d, LipschitzLayer

__all__ = ["prepare"]


def prepare(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """Teach Opacus the Lipschitz layers of ``model``; returns the same ``model``.

    Call it after the last change of the model's structure and before ``PrivacyEngine.make_private``. It registers a
    grad sampler, and where one is exact a norm sampler, for the class of every :class:`LipschitzLayer` with parameters
    in the model, and marks these layers. Any layer that keeps the contract takes part, subclasses and your own too.

    Guarantee. Per-example gradients equal those of a loop over single examples, in the modes ``"hooks"``,
    ``"functorch"`` and ``"ghost"``; what a layer was at a forward call (its ``p``, masks, buffers, keywords) is what
    its gradients are computed with, whatever changes before the backward pass. The mode ``"ew"`` takes
    :class:`Affine` and :class:`AffineConv2d` layers only. Everything else is refused at the first forward call at the
    latest, before any gradient is formed.

    Opacus refuses every trainable layer that has buffers, for fear of statistics of private data. Marked layers answer
    that question with none, and instead every training pass checks that it leaves all buffers of the model alone.

    Args:
        model: any module; torch's own layers are Opacus' business.
        optimizer: the torch optimizer that will be made private. Layers are projected back into their constraint sets
            after each of its steps, which is post-processing and costs no privacy.

    Raises:
        IncompatibleModelError: the model was made private already, or a finding of
            :func:`dplip.interop.opacus.validate` that Opacus would not refuse itself.
    """
    if any(_owner(hook) is not None for m in model.modules() for hook in m._forward_hooks.values()):
        raise IncompatibleModelError(
            "prepare: expected a plain model, got one under Opacus; prepare before make_private"
        )
    refused = refusals(model)
    if refused:
        raise IncompatibleModelError("; ".join(str(finding) for finding in refused))
    for layer in _trained(model):
        register_grad_sampler(type(layer))(_grad_sample)
        if norm_rule(type(layer)) is not None:
            register_norm_sampler(type(layer))(_norm_sample)
        if not _is_prepared(layer):
            layer.register_forward_pre_hook(_before_forward, with_kwargs=True)
            layer.buffers = _no_buffers  # type: ignore[method-assign]
    watch(model)
    if optimizer is not None:
        inner = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        hooks = inner._optimizer_step_post_hooks.values()
        if not any(isinstance(h, partial) and h.func is _project and h.args[0] is model for h in hooks):
            inner.register_step_post_hook(partial(_project, model))
    return model


def _trained(model: nn.Module) -> Iterator[LipschitzLayer]:
    """The layers that Opacus will ask about: those with parameters of their own."""
    for layer in model.modules():
        if isinstance(layer, LipschitzLayer) and next(layer.parameters(recurse=False), None) is not None:
            yield layer


def _is_prepared(layer: nn.Module) -> bool:
    return _before_forward in layer._forward_pre_hooks.values()


def _no_buffers(recurse: bool = True) -> Iterator[Tensor]:
    return iter(())


def _project(model: nn.Module, *_: Any) -> None:
    for layer in model.modules():
        if isinstance(layer, LipschitzLayer):
            layer.project_()


# What Opacus calls


def _grad_sample(layer: LipschitzLayer, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    found = recall(layer, activations[0]).gradients(activations[0], backprops)
    return {p: found[name] for name, p in layer.named_parameters(recurse=False) if p.requires_grad}


def _norm_sample(layer: LipschitzLayer, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    rule = norm_rule(type(layer))
    if rule is None:
        raise IncompatibleModelError(f"{type(layer).__name__}: expected its norm rule, got none; call prepare again")
    found = rule(recall(layer, activations[0]), activations[0], backprops)
    return {p: found[name] for name, p in layer.named_parameters(recurse=False) if p.requires_grad}


def _functorch_sample(
    layer: LipschitzLayer, parameters: list[nn.Parameter], activations: Tensor, backprops: Tensor
) -> tuple[Tensor, ...]:
    """Stands where Opacus puts its vmap over a deep copy, which keeps the attributes of the time of wrapping."""
    found = recall(layer, activations).gradients(activations, backprops)
    own = {id(p): found[name] for name, p in layer.named_parameters(recurse=False)}
    nothing = backprops.new_zeros(())  # children have hooks of their own
    return tuple(own.get(id(p), nothing.expand(len(activations), *p.shape)) for p in parameters)


def _before_forward(layer: LipschitzLayer, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if any(isinstance(p, ExpandedWeight) for p in layer._parameters.values()):
        _require_expandable(layer)
        return
    host = next((o for o in map(_owner, layer._forward_hooks.values()) if o is not None), None)
    if host is None or not layer.training or not torch.is_grad_enabled():
        return  # nobody will ask about this call
    if host not in _CHECKED:
        _require_sound(host)
        _CHECKED.add(host)
    if "ft_compute_sample_grad" in vars(layer):
        vars(layer)["ft_compute_sample_grad"] = partial(_functorch_sample, layer)
    record(layer, args, keywords)


_CHECKED: WeakSet[AbstractGradSampleHooks] = WeakSet()


def _owner(hook: Any) -> AbstractGradSampleHooks | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, AbstractGradSampleHooks) else None


def _require_sound(host: AbstractGradSampleHooks) -> None:
    """Refuse what Opacus was asked to do with the model where it would be wrong or is untested."""
    model, mode = host._module, type(host).__name__
    if not host.batch_first:
        raise IncompatibleModelError(
            "Opacus: expected batch_first=True, got False; Lipschitz layers carry the batch first"
        )
    if mode.endswith(("FSDP", "TP")):
        raise IncompatibleModelError(
            f"Opacus: expected the mode hooks, functorch or ghost, got {mode}; it looks samplers up by another class"
        )
    late = [name for name, m in model.named_modules() if isinstance(m, LipschitzLayer) and _is_unprepared(m)]
    if late:
        raise IncompatibleModelError(
            f"Opacus: expected prepared layers, got {late} that joined the model later; call prepare(model) again"
        )
    if isinstance(host, GradSampleHooksFastGradientClipping):
        shared = refusals(model, grad_sample_mode="ghost")
        if shared:
            raise IncompatibleModelError("; ".join(str(finding) for finding in shared))


def _is_unprepared(layer: LipschitzLayer) -> bool:
    return next(layer.parameters(recurse=False), None) is not None and not _is_prepared(layer)


def _require_expandable(layer: LipschitzLayer) -> None:
    for home in (Affine, AffineConv2d):
        if isinstance(layer, home) and type(layer).forward is home.forward:
            return
    raise IncompatibleModelError(
        f"{type(layer).__name__}: expected a grad_sample_mode that knows it, got 'ew', which covers torch's own linear "
        "and convolution calls only; use 'hooks' or 'ghost'"
    )
