# SPDX-License-Identifier: Apache-2.0
"""Replacements for modules that Opacus cannot train, where a sound one exists."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dplip.interop.opacus.findings import structure
from dplip.layers import LipschitzLayer, MeanShift, ReferenceShift

__all__ = ["fix"]

_MOST_GROUPS = 32  # Wu, He, Group Normalization, ECCV 2018, section 4


def fix(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which everything with a sound replacement is replaced; the original stays as it is.

    * Batch normalisation becomes group normalisation with the same affine parameters, also where it trains nothing: of
      all channels together in one dimension (groups of one or two would leave zeros or signs of a dense layer's
      output, so fewer than three channels are left alone), in up to 32 groups for images and volumes.
    * Instance normalisation stops keeping running statistics.
    * In a ``Sequential``, a Lipschitz layer followed by ``MeanShift`` becomes ``ReferenceShift`` of that layer.
    * In-place activations stop being in place.
    * What Opacus itself replaces (recurrent layers, attention) it does.

    The function changes: train the result from the start. What is left is in :func:`dplip.interop.opacus.validate`.
    """
    fixed = copy.deepcopy(model)
    if isinstance(fixed, MeanShift):
        return fixed
    _walk(fixed, _shift_by_reference)
    _walk(fixed, _keep_no_statistics)
    root = _without_statistics(fixed)
    fixed = fixed if root is None else root
    for module in fixed.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    if any(f.kind == "opacus" for f in structure(fixed)):
        fixed = ModuleValidator.fix(fixed)
    return fixed


def _walk(module: nn.Module, change: Callable[[nn.Module], None]) -> None:
    change(module)
    for child in module.children():
        _walk(child, change)


def _shift_by_reference(parent: nn.Module) -> None:
    if not isinstance(parent, nn.Sequential):
        return
    names = list(parent._modules)
    for before, name in itertools.pairwise(names):
        layer = parent._modules[before]
        if isinstance(parent._modules[name], MeanShift) and isinstance(layer, LipschitzLayer):
            parent._modules[before] = ReferenceShift(layer).train(layer.training)
            parent._modules[name] = nn.Identity()


def _keep_no_statistics(parent: nn.Module) -> None:
    for name, child in parent.named_children():
        other = _without_statistics(child)
        if other is not None:
            parent._modules[name] = other


def _without_statistics(module: nn.Module) -> nn.Module | None:
    """The replacement of one normalisation module; None where there is nothing to do or no sound one."""
    if isinstance(module, _BatchNorm):
        channels, images = module.num_features, isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)
        if not images and channels < 3:
            return None
        groups = math.gcd(_MOST_GROUPS, channels) if images else 1
        return _like(module, nn.GroupNorm(groups, channels, module.eps, module.affine))
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        other = type(module)(module.num_features, eps=module.eps, affine=module.affine, track_running_stats=False)
        return _like(module, other)
    return None


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """``new`` with the parameters, device, type and mode of ``old``."""
    for name, p in old.named_parameters(recurse=False):
        setattr(new, name, p)
    return new.train(old.training)
