# SPDX-License-Identifier: Apache-2.0
"""Annealing the exponent of distance neurons from a smooth power mean to the l_inf distance."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dplip.errors import ConfigError
from dplip.layers import DistanceLayer

__all__ = ["GeometricDecay", "PSchedule", "at_p", "distance_groups", "scale_learning_rates", "set_p"]


def _annealed(model: nn.Module) -> list[DistanceLayer]:
    layers = [
        m for m in model.modules() if isinstance(m, DistanceLayer) and isinstance(getattr(type(m), "p", None), property)
    ]
    if not layers:
        raise ConfigError(
            f"p schedule: expected a model with annealed distance layers (LinfDistance), got none in "
            f"{type(model).__name__}; build it with them"
        )
    return layers


def set_p(model: nn.Module, p: float) -> None:
    """Give every annealed distance layer of ``model`` the exponent ``p``.

    Power-mean layers are 1-Lipschitz in l_inf at every ``p``, so certificates hold throughout; bounds of per-example
    gradients depend on ``p`` and are read anew at every private step.

    Raises:
        ConfigError: no layer has an exponent, or ``p < 2``.
    """
    for layer in _annealed(model):
        layer.p = p  # type: ignore[attr-defined]


@contextlib.contextmanager
def at_p(model: nn.Module, p: float) -> Iterator[None]:
    """Within the context, every annealed layer has exponent ``p``: ``at_p(model, math.inf)`` is the deployed
    network."""
    layers: list[Any] = _annealed(model)
    before = [layer.p for layer in layers]
    try:
        set_p(model, p)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.p = old


def _progress(at: float, begin: float, finish: float) -> float:
    return 1.0 if finish <= begin else min(max((at - begin) / (finish - begin), 0.0), 1.0)


@dataclass(frozen=True)
class GeometricDecay:
    """``start (end / start)^r`` with ``r = (t - begin) / (finish - begin)`` cut to [0, 1].

    Used for the cross-entropy's weight in :class:`dplip.margin_losses.Mixture`, with the times of :class:`PSchedule`.

    Raises:
        ConfigError: a value is not positive and finite.
    """

    start: float
    end: float
    begin: float
    finish: float

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise ConfigError(
                f"{type(self).__name__}: expected positive finite ends, got {self.start} and {self.end}; fix them"
            )

    def at(self, t: float) -> float:
        """The value at time ``t``, in the unit of ``begin`` and ``finish`` (epochs, or steps)."""
        return self.start * math.exp(math.log(self.end / self.start) * _progress(t, self.begin, self.finish))


@dataclass(frozen=True)
class PSchedule(GeometricDecay):
    """``p = start (end / start)^r`` until ``finish``, then ``last`` (infinity).

    Source: Zhang, Cai, Lu, He, Wang, Towards Certifying L-infinity Robustness using Neural Networks with L-inf-dist
    Neurons, ICML 2021, section 4.2; 8 to 1000 in all of its experiments.

    Raises:
        ConfigError: an exponent is below 2, or the ends are not finite.
    """

    start: float = 8.0
    end: float = 1000.0
    begin: float = 0.0
    finish: float = 1.0
    last: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (min(self.start, self.end) >= 2 and self.last >= 2):
            raise ConfigError(
                f"PSchedule: expected exponents >= 2, got {self.start}, {self.end} and {self.last}; "
                "no bound is offered below 2"
            )

    def at(self, t: float) -> float:
        return self.last if t >= self.finish else super().at(t)

    def apply(self, model: nn.Module, t: float) -> float:
        """Set and return the exponent of time ``t``."""
        p = self.at(t)
        set_p(model, p)
        return p


def distance_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: one per weight of a power-mean layer, one for all else.

    Each holds ``base_lr`` and ``row_length``, ``d`` or None, for :func:`scale_learning_rates`.
    """
    groups: list[dict[str, Any]] = []
    scaled = set()
    for layer in _annealed(model):
        if getattr(layer, "power_mean", True):
            groups.append({"params": [layer.weight], "lr": lr, "base_lr": lr, "row_length": layer.in_features})
            scaled.add(id(layer.weight))
    rest = [q for q in model.parameters() if id(q) not in scaled]
    return [*groups, {"params": rest, "lr": lr, "base_lr": lr, "row_length": None}] if rest else groups


def scale_learning_rates(optimizer: Optimizer, p: float, factor: float = 1.0) -> None:
    """``lr = factor base_lr d^(1/p)`` for weights of power-mean layers, ``factor base_lr`` for all else.

    The gradient of a power mean is ``d^(-1/p)`` times that of the l_p distance; this undoes it for optimizers whose
    step follows the gradient's size, like SGD. Adam divides by that size, so leave ``factor`` alone to act there.

    Raises:
        ConfigError: the optimizer's groups are not those of :func:`distance_groups`.
    """
    for group in optimizer.param_groups:
        if "base_lr" not in group or "row_length" not in group:
            raise ConfigError(
                "scale_learning_rates: expected the groups of distance_groups(model, lr), got others; "
                "build the optimizer from them"
            )
        d = group["row_length"]
        group["lr"] = factor * group["base_lr"] * (1.0 if d is None else d ** (1 / p))
