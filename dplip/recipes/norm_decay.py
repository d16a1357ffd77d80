# SPDX-License-Identifier: Apache-2.0
"""Weight decay in the norm of the neuron: the l_p-aware AdamW of l_inf-distance networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError
from dplip.layers import DistanceLayer

__all__ = ["NormDecayAdam", "norm_decay_"]


@torch.no_grad()
def norm_decay_(weight: Tensor, p: float, rate: float) -> None:
    """``w_i -= rate (|w_i| / ||w||_p)^(p-2) w_i`` for every row ``w`` of ``weight``, in place.

    A step down the gradient of ``||w||_p^2 / 2``; ``p = 2`` is ordinary decay, at ``p = inf`` only the first entry of
    the largest magnitude decays. A row of zeros stays.

    Source: Zhang, Cai, Lu, He, Wang, Towards Certifying L-infinity Robustness using Neural Networks with L-inf-dist
    Neurons, ICML 2021, section 4.4.
    """
    rows = weight.detach().flatten(1)
    magnitude = rows.abs()
    if math.isinf(p):
        index = magnitude.argmax(1, keepdim=True)
        step = torch.zeros_like(rows).scatter_(1, index, rows.gather(1, index))
    else:
        largest = magnitude.amax(1, keepdim=True)
        ratio = magnitude / torch.where(largest > 0, largest, 1)  # first by the largest, so that no power overflows
        norm = ratio.pow(p).sum(1, keepdim=True).pow(1 / p)
        step = (ratio / torch.where(norm > 0, norm, 1)).pow(p - 2) * rows
    weight.sub_(rate * step.view_as(weight))


class NormDecayAdam(torch.optim.Adam):
    """Adam with decoupled decay: :func:`norm_decay_` at the layer's current ``p`` for weights of annealed distance
    layers.

    All other parameters decay as in AdamW, ``w *= 1 - lr weight_decay``; so do those of distance layers without
    exponent, unless ``decay_distances`` is False, which excludes every distance layer (SortNet's recipe). Decay
    precedes the step and touches only parameters with a gradient.

    Args:
        model: its parameters are optimised, one group each.
        lr, betas, eps: of Adam; the source's defaults.
        weight_decay: decay per unit of learning rate.
        decay_distances: decay the parameters of distance layers.

    Raises:
        ConfigError: ``weight_decay`` is negative.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-10,
        weight_decay: float = 5e-3,
        decay_distances: bool = True,
    ) -> None:
        if not weight_decay >= 0:
            raise ConfigError(f"NormDecayAdam: expected weight_decay >= 0, got {weight_decay}; fix it")
        self.decay, self._owners = float(weight_decay), {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                self._owners[id(parameter)] = module
        self._decays_distances = decay_distances
        super().__init__(model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=0.0)

    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """Decay, then Adam's step; ``closure`` is evaluated once, before both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and self.decay > 0:
                    self._decay_(parameter, group["lr"] * self.decay)
        super().step()
        return loss

    def _decay_(self, parameter: Tensor, rate: float) -> None:
        owner = self._owners[id(parameter)]
        distance = isinstance(owner, DistanceLayer)
        if distance and not self._decays_distances:
            return
        p = getattr(owner, "p", None) if distance and parameter is owner.weight else None
        if p is not None:
            norm_decay_(parameter, p, rate)
        else:
            with torch.no_grad():
                parameter.mul_(1 - rate)
