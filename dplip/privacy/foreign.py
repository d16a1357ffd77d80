# SPDX-License-Identifier: Apache-2.0
"""Modules without a bound inside a clip-free model: their gradients are clipped per example, the rest is proved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, vjp, vmap

from dplip.bounds import Graph
from dplip.bounds.operations import Apply
from dplip.errors import ConfigError, DplipError, MixesExamplesError, NoRuleError, PlanError
from dplip.layers import LipschitzLayer, Shapes
from dplip.norms import Norms, OperatorNorms

__all__ = ["ForeignModule", "check_foreign", "clip_foreign", "foreign_groups", "unclip_foreign"]


class ForeignModule(LipschitzLayer):
    r"""``y_b = f(x_b)`` for any module ``f``; ``p.grad`` of its parameters is ``sum_b clip(g_b, max_grad_norm)``.

    ``g_b`` is example ``b``'s gradient in all trainable parameters of ``f`` together, ``clip(g, C) = g min(1, C /
    ||g||_2)``, and an example whose gradient is not finite contributes 0. Shapes: those of ``f`` with the batch first.

    Guarantee. One example moves the summed gradient of ``f``'s parameters by at most ``C`` jointly, whatever ``f`` and
    the cotangent are (Abadi et al., CCS 2016): ``f`` runs under ``vmap``, one example at a time, so neither its output
    nor its gradient for one example can depend on another. Everything else about ``f`` is unknown: its operator norms
    are infinite. What that allows follows from the calculus and needs no list of topologies:

    * parameters BELOW ``f`` (whose cotangent passes through it) have no bound and are refused, except those of another
      ForeignModule, which are clipped themselves;
    * layers ABOVE whose gradient grows with their input are refused, unless a layer with a bounded range
      (:class:`dplip.layers.BallClip`, ``Clamp``, a sigmoid) stands between; distance layers need none;
    * branches beside ``f`` keep their bounds.

    With ``K`` augmented copies of an example each copy is clipped, so the bound is ``K C``.

    Cost: per-example gradients of ``f`` for ``chunk_size`` examples at a time.

    Args:
        module: ``f``, from one tensor [B, *] to one tensor [B, *].
        max_grad_norm: ``C``.
        chunk_size: examples whose gradients are held in memory at once.

    Raises:
        ConfigError: ``max_grad_norm`` is not positive and finite or ``chunk_size`` is below 1.
        NoRuleError: in ``forward``, if ``f`` cannot run under ``vmap``: batch statistics, random numbers, updates of
            buffers, control flow that depends on values.
    """

    def __init__(self, module: nn.Module, max_grad_norm: float, chunk_size: int = 64) -> None:
        super().__init__()
        if not 0 < max_grad_norm < math.inf or chunk_size < 1:
            raise ConfigError(
                "ForeignModule: expected 0 < max_grad_norm < inf and chunk_size >= 1, "
                f"got {max_grad_norm} and {chunk_size}; fix them"
            )
        self.module, self.max_grad_norm, self.chunk_size = module, float(max_grad_norm), int(chunk_size)

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _PerExample.apply(self, x, *self.module.parameters())
        return y

    def _one(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """``f`` of one example [*]."""
        state = {**dict(self.module.named_buffers()), **parameters}
        y = functional_call(self.module, state, (x.unsqueeze(0),))
        if not isinstance(y, Tensor) or y.ndim < 2 or y.shape[0] != 1:
            raise NoRuleError(
                f"ForeignModule: expected {type(self.module).__name__} to map [1, *] to one tensor [1, *], got "
                f"{tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}; wrap it in a module that does"
            )
        return y.squeeze(0)

    def _mapped(self, function: Any, *batched: Tensor) -> Any:
        try:
            return vmap(function)(*batched)
        except DplipError:
            raise
        except Exception as error:  # foreign code under vmap fails in many ways
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NoRuleError(
                f"ForeignModule: expected {type(self.module).__name__} to treat each example by itself under "
                f"torch.func.vmap, got: {reason}; remove dropout, batch statistics and updates of buffers "
                "(dplip.privacy.fix), and control flow that depends on values"
            ) from error

    def values(self, x: Tensor) -> Tensor:
        """``f`` of every example, one at a time as far as ``f`` can tell."""
        weights = {name: p.detach() for name, p in self.module.named_parameters()}
        if len(x) == 0:  # the shape of one, without one
            return self._one(weights, x.new_zeros(x.shape[1:])).unsqueeze(0)[:0]
        y: Tensor = self._mapped(lambda v: self._one(weights, v), x)
        return y

    def pulled(self, x: Tensor, g: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Clipped per-example gradients of the trainable parameters, and the unclipped one of ``x``."""
        weights = {name: p.detach() for name, p in self.module.named_parameters()}
        moving = {name: weights[name] for name, p in self.module.named_parameters() if p.requires_grad}

        def pull(v: Tensor, cotangent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            _, back = vjp(lambda p, u: self._one(weights | p, u), moving, v)
            result: tuple[dict[str, Tensor], Tensor] = back(cotangent)
            return result

        grads, dx = self._mapped(pull, x, g)
        total = x.new_zeros(len(x), dtype=torch.float64)
        for part in grads.values():
            total += part.flatten(1).double().square().sum(1)
        norm = total.sqrt()
        factor = torch.where(torch.isfinite(norm), self.max_grad_norm / norm.clamp_min(self.max_grad_norm), 0.0)
        clipped = {
            name: torch.nan_to_num(part, 0.0, 0.0, 0.0) * factor.to(part.dtype).view(-1, *[1] * (part.ndim - 1))
            for name, part in grads.items()
        }
        return clipped, dx

    def operator_norms(self, shapes: Shapes) -> OperatorNorms:
        return OperatorNorms()

    def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
        """``C`` for each tensor; jointly no more than that, which :class:`StepSensitivity` makes use of."""
        return {name: self.max_grad_norm for name, _ in self.named_parameters()}

    def per_sample_grad(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        clipped, _ = self.pulled(x, g)
        return {f"module.{name}": grad for name, grad in clipped.items()}

    def refuses_certificate(self) -> str | None:
        return f"{type(self.module).__name__} is foreign and has no Lipschitz bound"

    def extra_repr(self) -> str:
        return f"max_grad_norm={self.max_grad_norm:g}"


class _PerExample(torch.autograd.Function):
    """Forward of all examples; backward sums clipped per-example gradients."""

    @staticmethod
    def forward(ctx: Any, layer: ForeignModule, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)
        return layer.values(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer: ForeignModule = ctx.layer
        x, *parameters = ctx.saved_tensors  # which raises if a parameter has changed since
        names = [name for name, _ in layer.module.named_parameters()]
        sums = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True) if p.requires_grad}
        pieces = []
        for rows, cotangent in zip(x.split(layer.chunk_size), g.split(layer.chunk_size), strict=True):
            if len(rows) == 0:
                pieces.append(torch.zeros_like(rows))
                continue
            clipped, dx = layer.pulled(rows, cotangent)
            pieces.append(dx)
            for name, grads in clipped.items():
                sums[name] += grads.sum(0)
        return None, torch.cat(pieces), *(sums.get(name) for name in names)


def clip_foreign(module: nn.Module, foreign: Mapping[str, float]) -> nn.Module:
    """Wrap the named submodules of ``module``, in place, in :class:`ForeignModule`; returns ``module``.

    Parameters stay the same objects, so an optimizer built before keeps them; their names gain ``.module``.

    Args:
        module: the model.
        foreign: ``{name as in named_modules: max_grad_norm}``.

    Raises:
        ConfigError: a name is not a submodule, lies inside another one, or is already wrapped.
    """
    known = dict(module.named_modules())
    for name in foreign:
        parents = [name[:i] for i, letter in enumerate(name) if letter == "."]
        if not name or name not in known or isinstance(known[name], ForeignModule):
            raise ConfigError(
                f"foreign: expected the name of a submodule, got {name!r}; module.named_modules() lists them"
            )
        if any(p in foreign or isinstance(known.get(p), LipschitzLayer) for p in parents):
            raise ConfigError(f"foreign: expected submodules apart, got {name!r} inside another; name the outer one")
    for name, max_grad_norm in foreign.items():
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent)._modules[leaf] = ForeignModule(known[name], max_grad_norm)
    return module


def unclip_foreign(module: nn.Module, foreign: Iterable[str]) -> nn.Module:
    """Take the wrappers of :func:`clip_foreign` off the named submodules, in place; the function stays the same."""
    for name in foreign:
        wrapper = module.get_submodule(name)
        if isinstance(wrapper, ForeignModule):
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent)._modules[leaf] = wrapper.module
    return module


def foreign_groups(graph: Graph) -> dict[str, str]:
    """``{parameter name: group}`` of the parameters that are clipped together.

    Raises:
        PlanError: such a parameter is used outside its module too, where it is not clipped.
    """
    owners: dict[str, set[int]] = {}
    groups: dict[str, str] = {}
    for node in graph.nodes:
        layer = node.operation.layer if isinstance(node.operation, Apply) else None
        for name in node.parameters.values():
            owners.setdefault(name, set()).add(id(layer))
            if isinstance(layer, ForeignModule):
                groups.setdefault(name, f"foreign {id(layer)}")
    shared = sorted(name for name in groups if len(owners[name]) > 1)
    if shared:
        raise PlanError(
            f"foreign: expected parameters of one foreign module only, got {shared} in several places, where their "
            "gradients are not clipped together; untie them"
        )
    return groups


@torch.no_grad()
def check_foreign(graph: Graph, reference: Tensor) -> None:
    """Compare every foreign module on a public batch with its examples one at a time.

    A module that mixes examples is private all the same, since it runs on one at a time, but it would be another
    function than its author's.

    Raises:
        MixesExamplesError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, *reference.shape[1:], generator=generator, dtype=torch.float64).to(reference)
    values = graph.evaluate(reference + noise)
    for node in graph.nodes:
        layer = node.operation.layer if isinstance(node.operation, Apply) else None
        if isinstance(layer, ForeignModule):
            together, alone = layer.module(values[node.inputs[0]]), values[node.name]
            if together.shape != alone.shape or not torch.allclose(together, alone, rtol=1e-3, atol=1e-4):
                raise MixesExamplesError(
                    f"foreign: node '{node.name}' ({type(layer.module).__name__}) computes something else for a batch "
                    "than for its examples one by one; remove batch statistics and masks by position"
                )
