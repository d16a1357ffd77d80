# SPDX-License-Identifier: Apache-2.0
"""Bounds for modules and functions that dplip does not own.

A rule turns a foreign module, or a call of a foreign function with its non-tensor arguments, into a
:class:`LipschitzLayer`. Add one with :func:`register_rule`. Modules known to mix examples have a refusal
instead, which says what to use in their place.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dplip.errors import NoRuleError
from dplip.layers import (
    Abs,
    Affine,
    AffineConv2d,
    AveragePool2d,
    Clamp,
    Flatten,
    LipschitzLayer,
    MaxPool2d,
    MeanShift,
    Monotone,
    Scale,
)
from dplip.layers.window import Pair, Window, pair

__all__ = ["MIXES_EXAMPLES", "function_layer", "has_rule", "mixes_examples", "module_layer", "register_rule"]

Rule = Callable[..., LipschitzLayer]
_MODULES: dict[type[nn.Module], Rule] = {}
_FUNCTIONS: dict[Any, Rule] = {}

_SHIFT = "use dplip.layers.ReferenceShift (a public reference instead of batch statistics) or drop it"
MIXES_EXAMPLES: Mapping[type[nn.Module], str] = {
    kind: _SHIFT
    for kind in (
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.SyncBatchNorm,
        nn.LazyBatchNorm1d,
        nn.LazyBatchNorm2d,
        nn.LazyBatchNorm3d,
        MeanShift,
    )
}


def mixes_examples(module: nn.Module) -> str | None:
    """What to use instead of ``module`` where, as it stands, it makes examples depend on one another; None elsewhere.

    A module that has a rule, like :class:`dplip.layers.MeanShift`, mixes them in training mode only. A layer is asked
    with everything it wraps.
    """
    for part in module.modules() if isinstance(module, LipschitzLayer) else (module,):
        if part.training or not has_rule(part):
            remedy = next((text for kind, text in MIXES_EXAMPLES.items() if isinstance(part, kind)), None)
            if remedy is not None:
                return remedy
    return None


def register_rule(target: Any, rule: Rule) -> None:
    """Teach the bounds a module class or a function.

    Args:
        target: a subclass of :class:`torch.nn.Module`, a function (``torch.relu``) or a tensor method's name
            (``"relu"``).
        rule: for a module class, maps the module to a :class:`LipschitzLayer` whose parameters are those of the
            module, under the same names; for a function or method, maps the call's arguments after the first
            tensor to one without parameters. Test the layer with :class:`dplip.testing.LayerContract`.
    """
    if isinstance(target, type) and issubclass(target, nn.Module):
        _MODULES[target] = rule
    else:
        _FUNCTIONS[target] = rule


def has_rule(module: nn.Module) -> bool:
    """Whether ``module``'s exact class is bounded; builds nothing, so it is safe while torch.fx traces."""
    return isinstance(module, LipschitzLayer) or type(module) in _MODULES


def module_layer(module: nn.Module) -> LipschitzLayer | None:
    """The layer that stands for ``module``, or None where its exact class has no rule."""
    if isinstance(module, LipschitzLayer):
        return module
    rule = _MODULES.get(type(module))
    return None if rule is None else rule(module)


def function_layer(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LipschitzLayer | None:
    """The layer that stands for ``target(x, *args, **kwargs)``, or None where there is no rule."""
    rule = _FUNCTIONS.get(target)
    return None if rule is None else rule(*args, **kwargs)


def _convolution(module: nn.Conv2d) -> LipschitzLayer:
    padding = (0, 0) if module.padding == "valid" else module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        raise NoRuleError(
            f"nn.Conv2d: expected zero padding given as numbers, got padding={module.padding!r} and "
            f"padding_mode={module.padding_mode!r}; write the numbers"
        )
    window = Window(pair(module.kernel_size), pair(module.stride), pair(padding), pair(module.dilation))
    return AffineConv2d(module.weight, module.bias, window, module.groups)


def _max_pool(
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> LipschitzLayer:
    if pair(dilation) != (1, 1) or ceil_mode or return_indices:
        raise NoRuleError(
            "max_pool2d: expected dilation=1, ceil_mode=False and return_indices=False, "
            f"got {dilation}, {ceil_mode} and {return_indices}; drop them"
        )
    return MaxPool2d(kernel_size, stride or None, padding)


def _average_pool(
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> LipschitzLayer:
    if ceil_mode or divisor_override is not None or (not count_include_pad and pair(padding) != (0, 0)):
        raise NoRuleError(
            "avg_pool2d: expected ceil_mode=False, count_include_pad=True and no divisor_override, "
            f"got {ceil_mode}, {count_include_pad} and {divisor_override}; drop them"
        )
    return AveragePool2d(kernel_size, stride or None, padding)


def _flatten(start_dim: int = 1, end_dim: int = -1) -> LipschitzLayer:
    if (start_dim, end_dim) != (1, -1):
        raise NoRuleError(
            f"flatten: expected start_dim=1, end_dim=-1, got {start_dim}, {end_dim}; "
            "use dplip.layers.Flatten or dplip.layers.Reshape"
        )
    return Flatten()


def _clamp(min: float | None = None, max: float | None = None) -> LipschitzLayer:
    return Clamp(-math.inf if min is None else min, math.inf if max is None else max)


def _relu(inplace: bool = False) -> LipschitzLayer:
    if inplace:
        raise NoRuleError("relu: expected inplace=False, got True; in-place maps overwrite a bounded activation")
    return Monotone(torch.relu, roundings=0)


def _tanh() -> LipschitzLayer:
    return Monotone(torch.tanh, 1.0, bound=1.0)


def _sigmoid() -> LipschitzLayer:
    return Monotone(torch.sigmoid, 0.25, bound=1.0)


def _leaky(module: nn.LeakyReLU) -> LipschitzLayer:
    slope = module.negative_slope
    if slope < 0 or module.inplace:
        raise NoRuleError(f"nn.LeakyReLU: expected slope >= 0 and inplace=False, got {module}; change it")
    return Monotone(lambda x: F.leaky_relu(x, slope), max(1.0, slope))


def _hardtanh(module: nn.Hardtanh) -> LipschitzLayer:
    if module.inplace:
        raise NoRuleError("nn.Hardtanh: expected inplace=False, got True; in-place maps overwrite a bounded activation")
    return Clamp(module.min_val, module.max_val)


_MODULE_RULES: dict[type[nn.Module], Callable[[Any], LipschitzLayer]] = {
    nn.Identity: lambda m: Scale(1.0),
    nn.ReLU: lambda m: _relu(m.inplace),
    nn.LeakyReLU: _leaky,
    nn.Tanh: lambda m: _tanh(),
    nn.Sigmoid: lambda m: _sigmoid(),
    nn.Softplus: lambda m: Monotone(m, 1.0),
    nn.Hardtanh: lambda m: _hardtanh(m),
    nn.Flatten: lambda m: _flatten(m.start_dim, m.end_dim),
    nn.Linear: lambda m: Affine(m.weight, m.bias),
    nn.Conv2d: _convolution,
    nn.MaxPool2d: lambda m: _max_pool(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices),
    nn.AvgPool2d: lambda m: _average_pool(
        m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
}
_FUNCTION_RULES: list[tuple[tuple[Any, ...], Rule]] = [
    ((torch.relu, F.relu, "relu"), _relu),
    ((torch.tanh, F.tanh, "tanh"), _tanh),
    ((torch.sigmoid, F.sigmoid, "sigmoid"), _sigmoid),
    ((torch.abs, operator.abs, "abs"), Abs),
    ((torch.clamp, torch.clip, "clamp", "clip"), _clamp),
    ((F.max_pool2d, torch.max_pool2d), _max_pool),
    ((F.avg_pool2d,), _average_pool),
    ((torch.flatten, "flatten"), lambda start_dim=0, end_dim=-1: _flatten(start_dim, end_dim)),
    ((torch.neg, operator.neg, "neg"), lambda: Scale(-1.0)),
    (("contiguous",), lambda: Scale(1.0)),
]
_MODULES.update(_MODULE_RULES)
_FUNCTIONS.update({target: rule for targets, rule in _FUNCTION_RULES for target in targets})
