# SPDX-License-Identifier: Apache-2.0
"""A small unconstrained head on l_inf-Lipschitz features, trained and certified by intervals."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.errors import ConfigError, DataError

__all__ = ["HybridNet", "IntervalHead"]


class IntervalHead(nn.Module):
    r"""``z = V tanh(U x + a) + b``.

    Shapes: ``x`` [B, in_features], ``z`` [B, num_classes].

    :meth:`worst_margins` is sound: affine maps take a box to ``U mid +- |U| rad``, tanh is monotone, and the last
    affine is elided, ``max (z_j - z_y) <= (V_j - V_y) mid + |V_j - V_y| rad + b_j - b_y``. The model as a whole is
    certified by :func:`dplip.certify.certify` (``method="interval"`` or ``"best"``), which adds rounding and elides
    likewise.

    Source: Zhang, Cai, Lu, He, Wang, ICML 2021, section 4.5; elision: Gowal et al., Scalable Verified Training for
    Provably Robust Image Classification, ICCV 2019.

    Args:
        in_features, hidden, num_classes: sizes.

    Raises:
        ConfigError: a size is not positive.
    """

    def __init__(self, in_features: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        if min(in_features, hidden, num_classes) < 1:
            raise ConfigError(
                f"IntervalHead: expected positive sizes, got {in_features}, {hidden} and {num_classes}; fix them"
            )
        self.hidden, self.out = nn.Linear(in_features, hidden), nn.Linear(hidden, num_classes)
        with torch.no_grad():
            for layer in (self.hidden, self.out):
                layer.weight.normal_(std=1 / math.sqrt(layer.in_features))
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.hidden(x)))
        return y

    def worst_margins(self, lower: Tensor, upper: Tensor, labels: Tensor) -> Tensor:
        """Upper bounds on ``z_j - z_y`` over the box, 0 at ``j = y``: [B, num_classes]. Differentiable."""
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        centre, spread = self.hidden(middle), F.linear(half, self.hidden.weight.abs())
        lower, upper = torch.tanh(centre - spread), torch.tanh(centre + spread)
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        z = self.out(middle)
        # |V_j - V_y| rad for the true class only: [B, C, hidden] is formed, which is small for a head
        difference = (self.out.weight[None] - self.out.weight[labels][:, None]).abs()
        return z - z.gather(1, labels[:, None]) + torch.einsum("bch,bh->bc", difference, half)


class HybridNet(nn.Module):
    """``head(features(x))``, where every feature is ``constant``-Lipschitz in l_inf: boxes ``f(x) +- constant eps``
    enter the head.

    Args:
        features: [B, *] -> [B, F], such as distance layers, 1-Lipschitz at every ``p``.
        head: the interval head.
        constant: an upper bound on the features' l_inf Lipschitz constant. Training rests on it; certificates do not,
            they derive their own.

    Raises:
        ConfigError: ``constant`` is not positive.
    """

    def __init__(self, features: nn.Module, head: IntervalHead, constant: float = 1.0) -> None:
        super().__init__()
        if not 0 < constant < math.inf:
            raise ConfigError(f"HybridNet: expected constant > 0, got {constant}; fix it")
        self.features, self.head, self.constant = features, head, float(constant)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        return y

    def worst_margins(self, x: Tensor, labels: Tensor, eps: float) -> Tensor:
        """Upper bounds on ``z_j - z_y`` for all inputs within l_inf distance ``eps`` of ``x``: [B, C].

        Raises:
            DataError: ``eps`` is negative or NaN.
        """
        if not eps >= 0:
            raise DataError(f"HybridNet.worst_margins: expected eps >= 0, got {eps}; fix it")
        f = self.features(x)
        worst: Tensor = self.head.worst_margins(f - self.constant * eps, f + self.constant * eps, labels)
        return worst
