# SPDX-License-Identifier: Apache-2.0
"""What breaks the proof of clip-free training in torch's own modules, and what can take its place.

A replacement is listed only where the result is certain to have a rule. It is another function: train it from the
start, and look at what :func:`fix` says it changed.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from dplip.layers import (
    Affine,
    AffineConv2d,
    LipschitzLayer,
    MeanShift,
    NormalizedConv2d,
    NormalizedLinear,
    ReferenceShift,
)

__all__ = ["Change", "fix", "replacement"]

_MIXES = "its batch statistics make the examples depend on one another, and it keeps them without noise"
_RANDOM = "it draws random numbers in training, so what runs is not what is bounded; the noise regularises already"
_SPREAD = "its Jacobian has no bound: it grows without limit as the spread of its input vanishes"
_SMOOTH = "it has no rule; nn.ReLU is 1-Lipschitz and has one"
_IN_PLACE = "it overwrites a bounded activation"
_FREE = "the bounds of a free weight grow while it trains; one in a ball keeps them at 1"

_SPREADS = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, _InstanceNorm)
_SMOOTHS = (nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.SELU, nn.CELU, nn.Softsign, nn.RReLU)


@dataclass(frozen=True)
class Change:
    """One replacement that :func:`fix` made: where, what was there, what is there now, and why."""

    name: str
    before: str
    after: str
    why: str

    def __str__(self) -> str:
        return f"{self.name or 'model'}: {self.before} -> {self.after}: {self.why}"


def replacement(module: nn.Module) -> tuple[nn.Module, str] | None:
    """A module with a rule that can stand for ``module``, and why one is needed; None where none is known.

    The new module shares the parameters of the old one. Modules that need none give None too.
    """
    if isinstance(module, (_BatchNorm, MeanShift)):
        return nn.Identity(), _MIXES
    if isinstance(module, _DropoutNd):
        return nn.Identity(), _RANDOM
    if isinstance(module, (*_SPREADS, *_root_mean_square())):
        return nn.Identity(), _SPREAD
    if isinstance(module, _SMOOTHS):
        return nn.ReLU(), _SMOOTH
    if type(module) is nn.ReLU6:
        return nn.Hardtanh(0.0, 6.0), "it has a rule under its other name"
    if type(module) in (nn.ReLU, nn.LeakyReLU, nn.Hardtanh) and module.inplace:
        twin = copy.copy(module)
        twin.inplace = False
        return twin, _IN_PLACE
    if parametrize.is_parametrized(module, "weight") and isinstance(module, nn.Linear):
        return normalized(module), "its parametrization has no rule; a projected weight needs no gradient through it"
    if type(module) is nn.Conv2d and module.padding == "same" and module.padding_mode == "zeros":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if not any(r % 2 for r in reach) and set(module.stride) == {1}:
            twin = copy.copy(module)
            twin.padding = (reach[0] // 2, reach[1] // 2)
            return twin, "its padding has no rule as a word; the numbers are the same function"
    return None


def _root_mean_square() -> tuple[type[nn.Module], ...]:
    return (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()


@torch.no_grad()
def normalized(module: nn.Module) -> nn.Module:
    """The normalised layer that starts from the weight and bias of ``module``, projected; itself if there is none."""
    new: NormalizedLinear | NormalizedConv2d
    if isinstance(module, nn.Linear):
        new = NormalizedLinear(module.in_features, module.out_features, bias=module.bias is not None)
    elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        new = NormalizedConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
        )
    else:
        return module
    new.to(module.weight)
    new.weight.copy_(module.weight)
    if module.bias is not None and new.bias is not None:
        new.bias.copy_(module.bias)
    new.project_()
    return new.train(module.training)


def fix(module: nn.Module, *, normalize: bool = False) -> tuple[nn.Module, list[Change]]:
    """A copy of ``module`` with every module replaced that has a :func:`replacement`, and the list of changes.

    In a ``Sequential``, batch normalisation behind a distance or order-statistic layer becomes
    :class:`dplip.layers.ReferenceShift` of that layer, which centres by a public input instead of the batch. Half
    precision becomes float32. The copy need not be without findings: ask :func:`dplip.privacy.validate` again.

    Args:
        module: stays as it is.
        normalize: also put the weights of ``nn.Linear`` and ``nn.Conv2d`` into the spectral unit ball.
    """
    fixer = _Fixer(normalize)
    fixed = fixer.visit("", copy.deepcopy(module))
    low = sorted({str(p.dtype) for p in fixed.parameters() if p.dtype in (torch.float16, torch.bfloat16)})
    if low:
        fixed = fixed.float()
        fixer.changes.append(Change("", ", ".join(low), "torch.float32", "bounds are not proved in lower precision"))
    return fixed, fixer.changes


class _Fixer:
    """Walks a module once; a module in several places is replaced once."""

    def __init__(self, normalize: bool) -> None:
        self.normalize, self.changes = normalize, list[Change]()
        self._done: dict[int, tuple[nn.Module, nn.Module]] = {}  # the old one is kept, so that its id is

    def visit(self, name: str, old: nn.Module) -> nn.Module:
        if id(old) in self._done:
            return self._done[id(old)][1]
        new = self._replaced(name, old)
        self._done[id(old)] = (old, new)
        if new is old and not isinstance(old, LipschitzLayer):
            if isinstance(old, nn.Sequential):
                self._shift(name, old)
            for child_name, child in old._modules.items():
                if child is not None:
                    old._modules[child_name] = self.visit(f"{name}.{child_name}".lstrip("."), child)
        return new

    def _replaced(self, name: str, old: nn.Module) -> nn.Module:
        new, found = old, replacement(old)
        if found is not None:
            new, why = found
            self.changes.append(Change(name, _called(old), _called(new), why))
        if self.normalize and type(new) in (nn.Linear, nn.Conv2d):
            free, new = new, normalized(new)
            if new is not free:
                self.changes.append(Change(name, _called(free), _called(new), _FREE))
        return new.train(old.training)

    def _shift(self, name: str, parent: nn.Sequential) -> None:
        for before, after in itertools.pairwise(list(parent._modules)):
            layer, norm = parent._modules[before], parent._modules[after]
            if not isinstance(norm, (_BatchNorm, MeanShift)) or not isinstance(layer, LipschitzLayer):
                continue
            if isinstance(layer, (Affine, AffineConv2d, MeanShift, ReferenceShift)):  # it has a bias for that
                continue
            parent._modules[before] = ReferenceShift(layer).train(layer.training)
            parent._modules[after] = nn.Identity()
            where = f"{name}.{before}".lstrip(".")
            gone = f"{_called(layer)}, {_called(norm)}"
            self.changes.append(Change(where, gone, f"ReferenceShift({_called(layer)})", _MIXES))


def _called(module: nn.Module) -> str:
    return type(module).__name__
