# SPDX-License-Identifier: Apache-2.0
"""Warming up the radius that is trained for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dplip.errors import ConfigError

__all__ = ["EpsSchedule"]


@dataclass(frozen=True)
class EpsSchedule:
    """``target r`` with ``r = (t - begin) / (finish - begin)`` cut to [0, 1]; optionally with a quartic start.

    With ``smooth = s > 0``: ``target k r^4`` for ``r < s``, ``k = 1 / ((4 - 3 s) s^3)``, then the straight line that
    continues it to ``target``, with the same value and slope at ``s``.

    Source: Zhang, Jiang, He, Wang, Boosting the Certified Robustness of L-infinity Distance Nets, ICLR 2022 (code).

    Raises:
        ConfigError: ``target`` is negative or infinite, or ``smooth`` is outside [0, 1).
    """

    target: float
    begin: float = 0.0
    finish: float = 1.0
    smooth: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.target < math.inf or not 0 <= self.smooth < 1:
            raise ConfigError(
                f"EpsSchedule: expected a finite target >= 0 and 0 <= smooth < 1, "
                f"got {self.target} and {self.smooth}; fix them"
            )

    def at(self, t: float) -> float:
        """The radius at time ``t``, in the unit of ``begin`` and ``finish``."""
        r = 1.0 if self.finish <= self.begin else min(max((t - self.begin) / (self.finish - self.begin), 0.0), 1.0)
        s = self.smooth
        if s == 0:
            return self.target * r
        k = 1 / ((4 - 3 * s) * s**3)
        if r < s:
            return self.target * k * r**4
        return self.target * ((1 - k * s**4) / (1 - s) * (r - 1) + 1)
