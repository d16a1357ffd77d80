# SPDX-License-Identifier: Apache-2.0
"""Centre and scale of tabular columns, released privately: preprocessing that is in the ledger."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from accountants.events import Event, Gaussian, Sequence
from dplip.errors import DataError, PlanError
from dplip.privacy.noise import NoiseSource

__all__ = ["PrivateStandardizer"]

LOWEST, HIGHEST = -16, 32  # exponents of two kept apart; the histogram's outer bins hold the rest


@dataclass(frozen=True)
class PrivateStandardizer:
    """``x -> (clip(x / reach, -1, 1) - centre) / spread`` per column, with statistics released under Gaussian noise.

    Two releases, each a Gaussian mechanism of multiplier ``noise_multiplier`` on all examples:

    1. per column, a histogram of the binary exponent of ``|x|`` in ``HIGHEST - LOWEST + 1`` bins. An example adds one
    count
       per column: l_2 sensitivity ``sqrt(d)``. ``reach`` is the power of two that a tenth of the entries exceed half
       of.
    2. the sums of ``u``, ``u^2`` and of the label, ``u = clip(x / reach, -1, 1)``. An example adds a vector of l_2 norm
       at most ``sqrt(2 d + 1)`` for labels in [0, 1].

    Everything else is post-processing. Guarantee: :meth:`event`, on top of whatever else the data is used for; it has
    no dependence on the data but through the releases, the number of columns being public. Sensitivities are for
    adding or removing one example; sums are taken in float64.

    Attributes:
        reach, centre, spread: [d] each.
        positive_rate: released mean label, in [0.001, 0.999].
        size: released number of examples, at least 1.
        noise_multiplier: of each of the two releases.
    """

    reach: Tensor
    centre: Tensor
    spread: Tensor
    positive_rate: float
    size: float
    noise_multiplier: float

    @classmethod
    def release(cls, x: Tensor, y: Tensor, noise_multiplier: float, noise: NoiseSource) -> PrivateStandardizer:
        """Release the statistics of inputs ``x`` [N, d] and labels ``y`` [N] in [0, 1].

        Raises:
            DataError: shapes do not fit, or a value is not finite or a label outside [0, 1].
            PlanError: ``noise_multiplier`` is not positive and finite.
        """
        if x.ndim != 2 or y.shape != x.shape[:1] or not x.dtype.is_floating_point or x.shape[1] == 0:
            raise DataError(
                f"standardizer: expected float inputs [N, d] and labels [N], got {tuple(x.shape)} and "
                f"{tuple(y.shape)}; reshape them"
            )
        if not bool(torch.isfinite(x).all()) or (y.numel() and not bool(((y >= 0) & (y <= 1)).all())):
            raise DataError("standardizer: expected finite inputs and labels in [0, 1], got others; clean the data")
        if not 0 < noise_multiplier < math.inf:
            raise PlanError(f"standardizer: expected a noise_multiplier > 0, got {noise_multiplier}; fix it")
        d = x.shape[1]
        counts = _exponent_counts(x)
        noise.add_(counts, noise_multiplier * math.sqrt(d))
        size = max(1.0, float(counts.sum()) / d)
        reach = _reach(counts, size)
        u = (x.double() / reach).clamp(-1, 1)
        sums = torch.cat([u.sum(0), u.square().sum(0), y.double().sum().view(1)])
        sigma = noise_multiplier * math.sqrt(2 * d + 1)
        noise.add_(sums, sigma)
        centre = (sums[:d] / size).clamp(-1, 1)
        # below three standard deviations of its own noise a variance says nothing
        floor = max(3 * sigma / size, 1e-6)
        spread = (sums[d : 2 * d] / size - centre.square()).clamp_min(floor).sqrt()
        rate = min(max(float(sums[-1]) / size, 1e-3), 1 - 1e-3)
        return cls(reach, centre, spread, rate, size, float(noise_multiplier))

    def event(self) -> Event:
        """What was released, for the accountant."""
        return self.event_for(self.noise_multiplier)

    @staticmethod
    def event_for(noise_multiplier: float) -> Event:
        """What :meth:`release` releases at ``noise_multiplier``; for planning before any data is read."""
        return Sequence((Gaussian(noise_multiplier), Gaussian(noise_multiplier)))

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [N, d] standardised, in its own dtype; entries within ``2 / spread`` of 0."""
        u = (x.double() / self.reach).clamp(-1, 1)
        return ((u - self.centre) / self.spread).to(x.dtype)


def _exponent_counts(x: Tensor) -> Tensor:
    """[d, bins] float64: how many entries of each column have ``2^(k-1) <= |x| < 2^k``."""
    exponent = torch.frexp(x.double())[1].clamp(LOWEST, HIGHEST)
    exponent = torch.where(x == 0, LOWEST, exponent).long() - LOWEST
    bins = HIGHEST - LOWEST + 1
    return torch.stack([torch.bincount(column, minlength=bins) for column in exponent.T]).double()


def _reach(counts: Tensor, size: float, share: float = 0.1) -> Tensor:
    """[d] float64: the largest power of two whose bin and those above still hold ``share`` of the entries."""
    above = counts.flip(1).cumsum(1).flip(1) >= share * size
    steps = torch.arange(counts.shape[1], dtype=torch.float64)
    return torch.pow(2.0, (above * steps).amax(1) + LOWEST)
