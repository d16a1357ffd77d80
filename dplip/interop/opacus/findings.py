# SPDX-License-Identifier: Apache-2.0
"""What a model's structure says about training it with Opacus; a superset of Opacus' own ``ModuleValidator``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dplip.interop.opacus.norms import norm_rule
from dplip.layers import LipschitzLayer, MeanShift

__all__ = ["Finding", "refusals", "structure"]

_RECURRENT = (DPRNN, DPLSTM, DPGRU)  # Opacus hooks their parts


@dataclass(frozen=True)
class Finding:
    """One thing to know before training ``model.NAME`` with Opacus.

    Attributes:
        name: where, as in ``named_modules``; empty for the model itself.
        kind: a short word to filter by.
        problem: what is wrong and why it matters.
        remedy: what to do about it, an imperative.
        blocking: whether training would be wrong, non-private or impossible; otherwise it is a note.
        opacus_sees_it: whether Opacus itself would refuse.
    """

    name: str
    kind: str
    problem: str
    remedy: str
    blocking: bool = True
    opacus_sees_it: bool = False

    def __str__(self) -> str:
        return f"{self.name or 'model'}: {self.problem}; {self.remedy}"


def structure(model: nn.Module, grad_sample_mode: str = "hooks") -> list[Finding]:
    """Findings that need no data and no forward pass."""
    found = [*_mixing(model), *_buffers(model), *_captured(model), *_in_place(model)]
    if grad_sample_mode == "ghost":
        found += _shared(model)
    named = {f.name for f in found if f.blocking}
    for name, module in (("", model), *((n, m) for n, m in model.named_modules() if n)):
        known = ModuleValidator.VALIDATORS.get(type(module))
        if known is None or name in named or not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        found += [Finding(name, "opacus", str(e), "run fix(model)", opacus_sees_it=True) for e in known(module)]
    if not model.training:
        found.append(
            Finding(
                "", "evaluation", "the model is in evaluation mode", "call model.train() first", opacus_sees_it=True
            )
        )
    return found


def refusals(model: nn.Module, grad_sample_mode: str = "hooks") -> list[Finding]:
    """The blocking findings of :func:`structure` that Opacus would let through in silence."""
    return [f for f in structure(model, grad_sample_mode) if f.blocking and not f.opacus_sees_it]


def _has_own_trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _mixing(model: nn.Module) -> Iterator[Finding]:
    """Modules whose output for one example depends on others, whether or not they train anything."""
    for name, module in model.named_modules():
        kind, seen = type(module).__name__, _has_own_trainable(module)
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            yield Finding(
                name,
                "batch_statistics",
                f"{kind} normalises every example by the whole batch, so one example moves the gradients of all, and "
                "its running statistics are private data without noise"
                + ("" if seen else "; Opacus overlooks it because it trains nothing"),
                "replace it by GroupNorm, or run fix(model)",
                opacus_sees_it=seen,
            )
        elif isinstance(module, MeanShift) and module.training:
            yield Finding(
                name,
                "batch_statistics",
                "MeanShift subtracts the batch's mean and keeps a running mean of private data without noise; Opacus "
                "overlooks it because it trains nothing",
                "wrap the layer before it in dplip.layers.ReferenceShift instead, or run fix(model)",
            )
        elif isinstance(module, _InstanceNorm) and module.track_running_stats:
            yield Finding(
                name,
                "running_statistics",
                f"{kind} keeps running statistics of private data without noise",
                "build it with track_running_stats=False, or run fix(model)",
                opacus_sees_it=seen,
            )


def _buffers(model: nn.Module) -> Iterator[Finding]:
    for name, module in model.named_modules():
        known = isinstance(module, LipschitzLayer | _BatchNorm | _InstanceNorm) or _layers_inside(module)
        if _has_own_trainable(module) and not known and next(module.buffers(), None) is not None:
            yield Finding(
                name,
                "buffers",
                f"{type(module).__name__} trains parameters and holds buffers, which Opacus refuses",
                "use a layer of dplip.layers (NormalizedLinear for spectral_norm), or make the buffers constants of "
                "a LipschitzLayer of your own",
                opacus_sees_it=True,
            )


def _uses_fallback(module: nn.Module) -> bool:
    kind = type(module)
    if isinstance(module, LipschitzLayer) or kind in _RECURRENT or kind in GradSampleHooks.GRAD_SAMPLERS:
        return False
    return _has_own_trainable(module)


def _layers_inside(module: nn.Module) -> list[str]:
    """Names of the Lipschitz layers with parameters in ``module``."""
    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, LipschitzLayer)]
    return [name for name, m in layers if next(m.parameters(recurse=False), None) is not None]


def _captured(model: nn.Module) -> Iterator[Finding]:
    """Modules that Opacus hands to torch.func, with everything inside them."""
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in covered or not _uses_fallback(module):
            continue
        covered.update(module.modules())
        inside, kind = _layers_inside(module), type(module).__name__
        if inside:
            yield Finding(
                name,
                "captured",
                f"{kind} has parameters of its own, so Opacus copies it whole for torch.func, with {inside} as they "
                "are at that time: what is annealed later would be ignored",
                "move its parameters into a layer of their own, such as dplip.layers.LearnedScale or PositionBias",
            )
        else:
            yield Finding(
                name,
                "fallback",
                f"{kind} has no grad sampler: torch.func runs a copy made by make_private, without keyword arguments "
                "and without later changes of its attributes",
                "keep its attributes fixed and its arguments positional, or register a grad sampler",
                blocking=False,
            )


def _in_place(model: nn.Module) -> Iterator[Finding]:
    for name, module in model.named_modules():
        if getattr(module, "inplace", False) is True:
            yield Finding(
                name,
                "in_place",
                f"{type(module).__name__} overwrites the output of the layer before it, which Opacus' backward hooks "
                "do not allow behind a trainable layer",
                "set inplace=False, or run fix(model)",
                blocking=False,
            )


def _shared(model: nn.Module) -> Iterator[Finding]:
    """Parameters of several modules of which one is measured by a norm sampler, which sees its own part alone."""
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in set(module.parameters(recurse=False)):
            owners.setdefault(p, []).append((name, module))
    for p, several in owners.items():
        if len(several) > 1 and p.requires_grad and any(_has_norm_sampler(m) for _, m in several):
            yield Finding(
                several[0][0],
                "shared_parameter",
                f"a parameter is shared by {[n for n, _ in several]}; ghost clipping measures each use alone and would "
                "clip by too small a norm",
                "use grad_sample_mode='hooks'",
            )


def _has_norm_sampler(module: nn.Module) -> bool:
    if isinstance(module, LipschitzLayer):
        return norm_rule(type(module)) is not None
    return type(module) in GradSampleHooksFastGradientClipping.NORM_SAMPLERS
