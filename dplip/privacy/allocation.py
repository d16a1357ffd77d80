# SPDX-License-Identifier: Apache-2.0
"""How one step's noise is split over the parameter tensors.

Tensor ``k`` has sensitivity ``s_k`` (l_2, of the summed gradient under adding or removing one example) and ``d_k``
entries and gets noise of standard deviation ``sigma_k``. Scaling tensor ``k`` by ``1/sigma_k`` turns the joint release
into one Gaussian mechanism with noise multiplier ``z``, exactly when ``sum_k (s_k / sigma_k)^2 = 1 / z^2``. Every
rule below satisfies that equality, so all cost the same privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from dplip.errors import ConfigError

__all__ = ["ALLOCATIONS", "Tensors", "allocate", "check_allocation"]


class Tensors(NamedTuple):
    """Sensitivity and number of entries of one parameter tensor, and the weight ``> 0`` of its noise energy."""

    bound: float
    dim: int
    weight: float = 1.0

    @property
    def cost(self) -> float:
        """``sqrt(weight * dim)``."""
        return math.sqrt(self.weight * self.dim)


def _global(tensors: Mapping[str, Tensors]) -> dict[str, float]:
    total = math.hypot(*(t.bound for t in tensors.values()))
    return dict.fromkeys(tensors, total)


def _equal_share(tensors: Mapping[str, Tensors]) -> dict[str, float]:
    root = math.sqrt(len(tensors))
    return {name: root * t.bound for name, t in tensors.items()}


def _minimum_energy(tensors: Mapping[str, Tensors]) -> dict[str, float]:
    root = math.sqrt(sum(t.bound * t.cost for t in tensors.values()))
    return {name: math.sqrt(t.bound / t.cost) * root for name, t in tensors.items()}


ALLOCATIONS: Mapping[str, Callable[[Mapping[str, Tensors]], dict[str, float]]] = {
    "minimum_energy": _minimum_energy,
    "equal_share": _equal_share,
    "global": _global,
}
"""``minimum_energy``: ``sigma_k^2 = z^2 (s_k / sqrt(w_k d_k)) sum_j s_j sqrt(w_j d_j)``, the least
``sum w_k d_k sigma_k^2`` (Lagrange); with ``w_k = lr_k^2`` that is the noise energy of a plain SGD step, so slow
tensors leave budget to the others.
``equal_share``: ``sigma_k = z sqrt(K) s_k``. ``global``: ``sigma_k = z sqrt(sum s_j^2)`` for all."""


def allocate(rule: str, tensors: Mapping[str, Tensors], noise_multiplier: float) -> dict[str, float]:
    """Standard deviation of the noise on each tensor's summed gradient.

    A tensor of sensitivity 0 is the same for all data and gets none.

    Raises:
        ConfigError: ``rule`` is unknown, or a sensitivity is not finite.
    """
    if rule not in ALLOCATIONS:
        raise ConfigError(f"allocation: expected one of {sorted(ALLOCATIONS)}, got {rule!r}; choose one of them")
    for name, t in tensors.items():
        if not 0 <= t.bound < math.inf:  # NaN is not "no sensitivity"
            raise ConfigError(f"allocation: expected a finite sensitivity for '{name}', got {t.bound}; bound the model")
    moving = {name: t for name, t in tensors.items() if t.bound > 0}
    unit = ALLOCATIONS[rule](moving) if moving else {}
    sigma = {name: noise_multiplier * unit.get(name, 0.0) for name in tensors}
    if noise_multiplier > 0:
        check_allocation(tensors, sigma, noise_multiplier)
    return sigma


def check_allocation(tensors: Mapping[str, Tensors], sigma: Mapping[str, float], noise_multiplier: float) -> None:
    """Raise :class:`ConfigError` unless ``sum_k (s_k / sigma_k)^2 <= 1 / z^2`` up to rounding."""
    moving = {name: t.bound for name, t in tensors.items() if t.bound > 0}
    spent = sum(
        (noise_multiplier * (s / sigma[name])) ** 2 if sigma[name] > 0 else math.inf for name, s in moving.items()
    )
    if not spent <= 1 + 1e-9:
        raise ConfigError(f"allocation: expected z^2 sum (s/sigma)^2 <= 1, got {spent:g}; raise the noise")
