# SPDX-License-Identifier: Apache-2.0
"""Losses of certified training: hinges of margins, alone or beside a decaying cross-entropy.

The functions act on worst-case margins ``m`` [B, C]: upper bounds on ``z_j - z_y`` with ``m_y = 0``, from an interval
head or, for logits that are each 1-Lipschitz in l_inf, ``z_j - z_y + 2 eps``. The classes make margins from logits with
a threshold ``theta`` (``2 eps`` of the source) and are :class:`dplip.losses.BoundedLoss`: sums over the batch with
proved gradients.

Every gradient ``g`` here sums to zero and only the true logit's entry is negative, hence with ``a = |g_y|``
``||g||_1 = 2a``, ``||g||_inf <= a`` and ``||g||_2 <= sqrt(2) a``; what is proved for each loss is a bound on ``a``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.errors import ConfigError, DataError, PlanError
from dplip.losses import BoundedLoss
from dplip.norms import Norms

__all__ = ["CrossEntropyHinge", "Hinge", "Mixture", "clipped_margin", "hinge", "margins"]


def margins(logits: Tensor, labels: Tensor, theta: float) -> Tensor:
    """``m_j = z_j - z_y + theta`` for ``j != y`` and ``m_y = 0``: [B, C].

    Raises:
        DataError: shapes or dtypes do not fit, or there is one class.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or logits.shape[1] < 2:
        raise DataError(
            f"margins: expected logits [B, C >= 2] and int64 labels [B], got {tuple(logits.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}; pass class indices"
        )
    true = labels[:, None]
    return (logits - logits.gather(1, true) + theta).scatter(1, true, 0.0)


def hinge(worst: Tensor, max_weight: float) -> Tensor:
    """``max_weight max_j relu(m_j) + (1 - max_weight) / C sum_j relu(m_j)`` per example: [B, C] -> [B]."""
    positive = worst.clamp_min(0)
    return max_weight * positive.max(1)[0] + (1 - max_weight) * positive.mean(1)


def clipped_margin(worst: Tensor, clip: float) -> Tensor:
    """``max_j clamp(m_j, 0, clip)`` per example: [B, C] -> [B]. Examples beyond ``clip`` get no gradient."""
    return worst.max(1)[0].clamp(0, clip)  # max(dim) credits one index at a tie


def _from_true_entry(a: float, num_classes: int) -> Norms:
    return Norms(num_classes, l1=2 * a, l2=math.sqrt(2) * a, linf=a)


def _require_positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{where}: expected {name} > 0, got {value}; fix it")


class Hinge(BoundedLoss):
    r"""``sum_b w max_j relu(m_j) + (1 - w) / C sum_j relu(m_j)`` with ``m_j = z_j - z_y + theta``.

    Bounds: ``a = w + (1 - w)(C - 1)/C``, where every class is active; the l_2 bound is that gradient's own norm,
    ``sqrt(a^2 + (w + v)^2 + (C - 2) v^2)`` with ``v = (1 - w)/C``.

    Source: Zhang, Cai, Lu, He, Wang, ICML 2021, section 4.4, whose ``mix`` is ``max_weight`` (0.75). The second
    version of that code (Zhang, Jiang, He, Wang, ICLR 2022) calls ``1 - max_weight`` ``mix`` (0.25): the same loss.

    Args:
        theta: threshold, twice the radius to train for.
        max_weight: ``w`` in [0, 1].

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, theta: float, max_weight: float = 0.75) -> None:
        super().__init__()
        _require_positive("Hinge", theta=theta)
        if not 0 <= max_weight <= 1:
            raise ConfigError(f"Hinge: expected 0 <= max_weight <= 1, got {max_weight}; fix it")
        self.theta, self.max_weight = float(theta), float(max_weight)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return hinge(margins(logits, labels, self.theta), self.max_weight).sum()

    def logit_gradient(self, num_classes: int) -> Norms:
        c, w = num_classes, self.max_weight
        v = (1 - w) / c
        a = w + (c - 1) * v
        return Norms(c, l1=2 * a, l2=math.sqrt(a**2 + (w + v) ** 2 + max(c - 2, 0) * v**2), linf=a)

    def extra_repr(self) -> str:
        return f"theta={self.theta:g}, max_weight={self.max_weight:g}"


class _WithCrossEntropy(BoundedLoss):
    """``sum_b h(z_b) + weight CE(temperature z_b, y_b)``; ``weight`` is assigned to decay it.

    With ``learn_temperature`` the temperature is trained (as the exponential of a parameter, so never negative). It is
    a parameter outside the model, which no plan covers, so such a loss has no bounds and cannot train privately.
    """

    def __init__(self, theta: float, weight: float, temperature: float, learn_temperature: bool) -> None:
        super().__init__()
        where = type(self).__name__
        _require_positive(where, theta=theta, temperature=temperature)
        self.theta, self.weight = float(theta), weight
        log = torch.tensor(math.log(temperature))
        self.log_temperature = nn.Parameter(log) if learn_temperature else None
        self._temperature = float(temperature)

    @property
    def weight(self) -> float:
        """Weight of the cross-entropy, >= 0."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ConfigError(f"{type(self).__name__}: expected weight >= 0, got {value}; fix it")
        self._weight = float(value)

    @property
    def temperature(self) -> float:
        """Factor on the logits inside the cross-entropy, > 0."""
        return self._temperature if self.log_temperature is None else float(self.log_temperature.detach().exp())

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The weighted cross-entropy, summed."""
        scale = self._temperature if self.log_temperature is None else self.log_temperature.exp()
        return self.weight * F.cross_entropy(scale * logits, labels, reduction="sum")

    def _require_fixed(self) -> None:
        if self.log_temperature is not None:
            raise PlanError(
                f"{type(self).__name__}: expected a fixed temperature, got a learned one, whose own gradient no plan "
                "covers; use learn_temperature=False in private training"
            )

    def extra_repr(self) -> str:
        return f"theta={self.theta:g}, weight={self.weight:g}, temperature={self.temperature:g}"


class Mixture(_WithCrossEntropy):
    r"""``sum_b max_j clamp((z_j - z_y) / theta + 1, 0, clip) + weight CE(s z, y)``.

    Bounds: with ``e = weight s``, ``a <= max(e, 1/theta + e (1 - q))``,
    ``q = 1 / (1 + (C - 1) exp(s theta (clip - 1)))``: where the margin has a gradient every
    ``z_j <= z_y + (clip - 1) theta``, so ``p_y >= q``, and cross-entropy contributes ``e (1 - p_y)`` to the true entry.
    The bound at the largest ``weight`` covers a decaying one.

    Source: Zhang, Jiang, He, Wang, Boosting the Certified Robustness of L-infinity Distance Nets, ICLR 2022, section
    4.2.

    Args:
        theta: threshold, twice the radius to train for.
        weight: of the cross-entropy at first; see :class:`dplip.recipes.GeometricDecay`.
        clip: margin at which the hinge saturates, in units of ``theta``.
        temperature: ``s``.
        learn_temperature: train ``s``; not for private training.

    Raises:
        ConfigError: an argument is out of range.
        PlanError: bounds are asked for a learned temperature.
    """

    def __init__(
        self,
        theta: float,
        weight: float = 0.1,
        clip: float = 1.0,
        temperature: float = 1.0,
        learn_temperature: bool = False,
    ) -> None:
        super().__init__(theta, weight, temperature, learn_temperature)
        _require_positive("Mixture", clip=clip)
        self.clip = float(clip)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        worst = margins(logits / self.theta, labels, 1.0)
        return clipped_margin(worst, self.clip).sum() + self.cross_entropy(logits, labels)

    def logit_gradient(self, num_classes: int) -> Norms:
        self._require_fixed()
        e, exponent = self.weight * self.temperature, self.temperature * self.theta * (self.clip - 1)
        q = 1 / (1 + (num_classes - 1) * math.exp(exponent)) if exponent < 500 else 0.0
        return _from_true_entry(max(e, 1 / self.theta + e * (1 - q)), num_classes)


class CrossEntropyHinge(_WithCrossEntropy):
    r"""``sum_b 1[argmax z = y] max_j relu((z_j - z_y) / theta + 1) + weight CE(s z, y)``: right examples are pushed
    out.

    Bounds: ``a <= max(e, 1/theta + e (C - 1)/C)`` with ``e = weight s``, since ``p_y >= 1/C`` where ``y`` is the
    largest. The indicator is piecewise constant and has no gradient.

    Source: ``ce_hinge`` in the code of Zhang, Jiang, He, Wang, Rethinking Lipschitz Neural Networks and Certified
    Robustness: A Boolean Function Perspective, NeurIPS 2022.

    Args:
        theta, weight, temperature, learn_temperature: see :class:`Mixture`.

    Raises:
        ConfigError: an argument is out of range.
        PlanError: bounds are asked for a learned temperature.
    """

    def __init__(
        self, theta: float, weight: float = 1.0, temperature: float = 1.0, learn_temperature: bool = False
    ) -> None:
        super().__init__(theta, weight, temperature, learn_temperature)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        worst = margins(logits / self.theta, labels, 1.0)
        right = (logits.argmax(1) == labels).to(logits.dtype)
        return (right * clipped_margin(worst, math.inf)).sum() + self.cross_entropy(logits, labels)

    def logit_gradient(self, num_classes: int) -> Norms:
        self._require_fixed()
        e = self.weight * self.temperature
        return _from_true_entry(max(e, 1 / self.theta + e * (1 - 1 / num_classes)), num_classes)
