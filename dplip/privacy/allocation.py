# SPDX-License-Identifier: Apache-2.0
"""How one step's noise is split over the parameter tensors.

Tensor ``k`` has sensitivity ``s_k`` (l_2, of the summed gradient under adding or removing one example) and ``d_k``
entries and gets noise of standard deviation ``sigma_k``. Scaling tensor ``k`` by ``1/sigma_k`` turns the joint release
into one Gaussian mechanism with noise multiplier ``z``, exactly when ``sum_k (s_k / sigma_k)^2 = 1 / z^2``. Every
rule below satisfies that equality, so all cost the same privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dplip.errors import ConfigError

__all__ = ["ALLOCATIONS", "Tensors", "allocate", "check_allocation", "joint", "noise_weights"]


class Tensors(NamedTuple):
    """Sensitivity and number of entries of one parameter tensor, and the weight ``> 0`` of its noise energy.

    Tensors of one non-empty ``group`` have ``bound`` jointly, not each, and get noise of one standard deviation.
    """

    bound: float
    dim: int
    weight: float = 1.0
    group: str = ""

    @property
    def cost(self) -> float:
        """``sqrt(weight * dim)``."""
        return math.sqrt(self.weight * self.dim)


def joint(tensors: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """``tensors`` with the members of each group put together as one tensor under the group's name.

    With noise ``sigma`` on all members, ``sum_k ||v_k||^2 / sigma^2 <= bound^2 / sigma^2``: the group takes part in the
    equality above like a single tensor.
    """
    together: dict[str, Tensors] = {}
    for name, t in tensors.items():
        key = t.group or name
        old = together.get(key)
        if old is None:
            together[key] = t
            continue
        dim = old.dim + t.dim
        weight = (old.weight * old.dim + t.weight * t.dim) / dim
        # NaN is no bound
        bound = max(old.bound, t.bound) if old.bound == old.bound and t.bound == t.bound else math.nan
        together[key] = Tensors(bound, dim, weight, t.group)
    return together


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
    moving = joint({name: t for name, t in tensors.items() if t.bound > 0})
    unit = ALLOCATIONS[rule](moving) if moving else {}
    sigma = {name: noise_multiplier * unit.get(t.group or name, 0.0) for name, t in tensors.items()}
    if noise_multiplier > 0:
        check_allocation(tensors, sigma, noise_multiplier)
    return sigma


def check_allocation(tensors: Mapping[str, Tensors], sigma: Mapping[str, float], noise_multiplier: float) -> None:
    """Raise :class:`ConfigError` unless ``sum_k (s_k / sigma_k)^2 <= 1 / z^2`` up to rounding."""
    moving = joint({name: t for name, t in tensors.items() if t.bound > 0})
    least: dict[str, float] = {}
    for name, t in tensors.items():
        key = t.group or name
        least[key] = min(sigma[name], least.get(key, math.inf))
    spent = sum(
        (noise_multiplier * (t.bound / least[key])) ** 2 if least[key] > 0 else math.inf for key, t in moving.items()
    )
    if not spent <= 1 + 1e-9:
        raise ConfigError(f"allocation: expected z^2 sum (s/sigma)^2 <= 1, got {spent:g}; raise the noise")


def noise_weights(param_groups: Sequence[Mapping[str, Any]], trainable: Mapping[str, Tensor]) -> dict[str, float]:
    """Squared learning rate of each tensor over the largest, at least 1e-12: what hardly moves may be noisy.

    Learning rates are public configuration; a schedule must not follow private metrics.
    """
    rates = {id(p): float(group.get("lr", 1.0)) for group in param_groups for p in group["params"]}
    top = max(rates.values())
    if not 0 < top < math.inf:
        return dict.fromkeys(trainable, 1.0)
    return {name: max(rates.get(id(p), 0.0) / top, 1e-6) ** 2 for name, p in trainable.items()}
