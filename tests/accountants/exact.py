# SPDX-License-Identifier: Apache-2.0
"""Hockey-stick divergences computed without any accountant: closed forms and plain quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr


def gaussian_log_delta(multiplier: float, epsilon: float, sensitivity: float = 1.0) -> float:
    """Logarithm of ``Phi(m/2 - e/m) - exp(e) Phi(-m/2 - e/m)`` with ``m = sensitivity / multiplier``.

    Balle and Wang, ICML 2018, Theorem 8.
    """
    m = sensitivity / multiplier
    first, second = log_ndtr(m / 2 - epsilon / m), epsilon + log_ndtr(-m / 2 - epsilon / m)
    return float(first + math.log(-math.expm1(second - first)))


def gaussian_delta(multiplier: float, epsilon: float, sensitivity: float = 1.0) -> float:
    """The exact delta of the Gaussian mechanism."""
    return math.exp(gaussian_log_delta(multiplier, epsilon, sensitivity))


def gaussian_epsilon(multiplier: float, delta: float, sensitivity: float = 1.0) -> float:
    """The exact epsilon of the Gaussian mechanism."""

    def log_gap(epsilon: float) -> float:
        return gaussian_log_delta(multiplier, epsilon, sensitivity) - math.log(delta)

    if log_gap(0.0) <= 0.0:
        return 0.0
    top = 1e-3
    while log_gap(top) > 0.0:
        top *= 2.0
    return float(brentq(log_gap, 0.0, top, xtol=1e-13, rtol=1e-14))


Density = Callable[[np.ndarray], np.ndarray]


def mixture(weights: Sequence[float], means: Sequence[float], sigma: float) -> Density:
    """Density of ``sum_i w_i N(mean_i, sigma^2)``."""

    def density(x: np.ndarray) -> np.ndarray:
        parts = [w * np.exp(-0.5 * ((x - m) / sigma) ** 2) for w, m in zip(weights, means, strict=True) if w > 0]
        return np.asarray(sum(parts) / (sigma * math.sqrt(2 * math.pi)))

    return density


def hockey_stick(p: Density, q: Density, epsilon: float, sigma: float, shift: float = 2.0) -> float:
    """``integral max(0, p - exp(epsilon) q)`` by the midpoint rule on 400001 points."""
    edge = 12 * sigma + shift
    x, h = np.linspace(-edge, edge, 400_001, retstep=True)
    return float(np.maximum(p(x) - math.exp(epsilon) * q(x), 0.0).sum() * h)


def hockey_stick_twice(p: Density, q: Density, epsilon: float, sigma: float, shift: float = 1.0) -> float:
    """The same for two independent copies: a double integral on 3001 x 3001 points."""
    edge = 9 * sigma + shift
    x, h = np.linspace(-edge, edge, 3001, retstep=True)
    px, qx = p(x), q(x)
    total = 0.0
    for a, b in zip(px, qx, strict=True):
        total += float(np.maximum(a * px - math.exp(epsilon) * b * qx, 0.0).sum())
    return total * float(h) ** 2
