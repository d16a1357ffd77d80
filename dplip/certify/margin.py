# SPDX-License-Identifier: Apache-2.0
r"""Margin certificates from the norm calculus.

Theorem. Let ``z`` be the logits, ``t`` the top class at ``x``, and let ``L_tj`` be a Lipschitz constant of
``z_t - z_j``. Let ``tau`` bound the rounding of logit differences, in the deployment over the ball and in this
computation at ``x`` together. Then every ``x'`` with ``||x' - x|| <= r``, ``r < min_j ((z_t - z_j)(x) - tau) / L_tj``,
is assigned class ``t``.

Proof. The exact difference at ``x'`` is at least the exact one at ``x`` minus ``L_tj r``, so at least the computed one
at ``x`` minus ``L_tj r`` and this computation's rounding, which exceeds the deployment's rounding; so the deployed
difference at ``x'`` is positive for every ``j``.

Constants, with ``R`` the norms of the move of a node's value per unit move of the input:

* any model: ``z_t - z_j = <e_t - e_j, z>`` and Hoelder give ``L = min(2 R_inf, sqrt(2) R_2, R_1)`` at the output;
* affine head ``z = s W a + c``, ``d = w_t - w_j``: ``L_tj = |s| min(||d||_1 R_inf, ||d||_2 R_2, ||d||_inf R_1)`` at
  ``a``.

Both hold, so the smaller is taken.

Sources: Tsuzuku, Sato, Sugiyama, Lipschitz-Margin Training: Scalable Certification of Perturbation Invariance for Deep
Neural Networks, NeurIPS 2018, proposition 1; pairwise constants: Leino, Wang, Fredrikson, Globally-Robust Neural
Networks, ICML 2021, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dplip.bounds import unit_radii
from dplip.certify.head import find_head
from dplip.certify.roundoff import Roundoff
from dplip.certify.subject import Point, Subject
from dplip.errors import BoundViolation

__all__ = ["FARTHEST", "MarginCertifier"]

FARTHEST = 1e6
"""No claim reaches farther. Constant models would otherwise get infinite radii, at which arithmetic overflows."""

_DOWN = 1 - 2.0**-40


class MarginCertifier:
    """Global constants of one model in one norm, and the radii that follow from a batch's margins.

    Args:
        subject: the model.
        norm: ``"linf"`` or ``"l2"``.
        values: every node's value for any batch (only shapes are read).
    """

    def __init__(self, subject: Subject, norm: str, values: dict[str, Tensor]) -> None:
        self.subject, self.norm = subject, norm
        self.reach = unit_radii(subject.graph, values, norm)
        self.roundoff = Roundoff(subject.graph, values)
        self.head = find_head(subject.graph)
        self.constants = self._pair_constants(values[subject.graph.output])

    def _pair_constants(self, logits: Tensor) -> Tensor:
        """``L`` [C, C]."""
        out = self.reach[self.subject.graph.output]
        generic = min(2 * out.linf, math.sqrt(2) * (1 + 1e-15) * out.l2, out.l1)
        constants = logits.new_full((logits.shape[1], logits.shape[1]), generic)
        if self.head is not None:
            constants = torch.minimum(constants, self.head.pair_constants(self.reach[self.head.source]))
        return constants

    def slack(self, point: Point, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Rounding [B] of logit differences: in the deployment over the ball, and in float64 at its centre."""
        values, nowhere = point.values, torch.zeros_like(radius)
        deployed = self.roundoff.logit_errors(values, self.reach, radius, self.subject.deployed)
        return deployed, self.roundoff.logit_errors(values, self.reach, nowhere, torch.float64)

    def check(self, point: Point) -> None:
        """Raise :class:`BoundViolation` where the deployed and float64 logits differ by more than rounding."""
        if len(point.top) == 0:
            return
        difference = point.deployed - point.values[self.subject.graph.output]
        seen = difference.amax(1) - difference.amin(1)
        deployed, here = self.slack(point, torch.zeros_like(seen))
        allowed = deployed + here
        worst = torch.where(point.claimable, seen - allowed, -math.inf).argmax()
        if bool(point.claimable[worst]) and bool(seen[worst] > allowed[worst]):
            raise BoundViolation(
                f"certify: expected deployed logits within {float(allowed[worst]):.3g} of the float64 ones, "
                f"got {float(seen[worst]):.3g} in {self.subject.deployed}; turn off TF32 and autocast, "
                "remove forward hooks, or correct the fan_in of a layer of your own"
            )

    def radius(self, point: Point) -> Tensor:
        """[B] float64: the certified radius, 0 where there is none."""
        logits = point.values[self.subject.graph.output]
        if len(logits) == 0:
            return logits.new_zeros(0)
        constants = self.constants[point.top]
        others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, point.top[:, None], False)
        margin = logits.gather(1, point.top[:, None]) - logits
        self.check(point)
        farthest = _least_ratio(margin, constants, others)
        deployed, here = self.slack(point, farthest)  # over a ball at least as large as the one that is claimed
        radius = _least_ratio(margin - (deployed + here)[:, None], constants, others) * _DOWN
        return torch.where(point.claimable & (radius > 0), radius, 0.0)


def _least_ratio(margin: Tensor, constants: Tensor, others: Tensor) -> Tensor:
    """``min_j margin_j / L_j`` over the other classes, in [0, FARTHEST]; 0 where it is NaN."""
    ratio = torch.where(margin > 0, (margin / constants).clamp_max(FARTHEST), 0.0)
    ratio = torch.where(others, ratio, FARTHEST).amin(1)
    return torch.where(torch.isnan(ratio), 0.0, ratio)
