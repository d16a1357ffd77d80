# SPDX-License-Identifier: Apache-2.0
"""The default accountant: privacy loss distributions, by Google's dp-accounting.

Each mechanism is replaced by a discrete distribution of the privacy loss that dominates it ("connect the
dots", Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, PoPETs 2022, Algorithm 1), the distributions are
convolved by FFT, and epsilon is read off the hockey-stick divergence (Sommer, Meiser, Mohammadi, PoPETs 2019;
dominating pairs compose: Zhu, Dong, Wang, AISTATS 2022, Theorem 10). Both directions, adding and removing,
are followed and the larger answer is given.

Dominating pairs used, z the noise multiplier, N(m) = N(m, z^2), q the sampling probability:

* add or remove one: ``(1-q) N(0) + q N(1)`` against ``N(0)``, and the reverse;
* replace one: ``(1-q) N(0) + q N(1)`` against ``(1-q) N(0) + q N(-1)``, the two examples at opposite ends
  (Koskela, Jaelkoe, Honkela, AISTATS 2020, section 6). dp-accounting puts in that factor of two itself;
* truncated Poisson sampling: see ``_truncated``.

Where arithmetic could spoil the bound: the discretisation is pessimistic, dp-accounting moves every truncated
tail to an infinite loss, and what remains, rounding in the divergences and in the FFT, is taken out of delta
before epsilon is read (``1e-15`` per step plus ``1e-13``, about ten times the largest error seen). A delta
below that allowance has no finite proof here, and epsilon is then infinite: at 1000 steps below about 1e-12,
at 100000 steps below 1e-10.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from accountants.base import Accountant, Neighbors, UnsupportedEvent
from accountants.events import Event, Gaussian, PoissonSampled, TruncatedPoissonSampled
from accountants.mechanisms import basic_mechanisms, noise_multiplier
from accountants.pld_grid import BASE_INTERVAL, grid_interval
from accountants.rounding import merge_similar

_MOST_MECHANISMS = 80
_DRAFT_COARSENING = 8.0
_ROUNDING_PER_STEP = 1e-15
_ROUNDING_STEPS = 100
_NEGLIGIBLE = 1e-18


class PldAccountant(Accountant):
    """Upper bounds within about 1e-3 of the exact epsilon for usual training runs.

    Supports Gaussian, PoissonSampled and TruncatedPoissonSampled Gaussians, Repeat and Sequence, under both
    relations. More than 80 different steps are merged first (``accountants.rounding``: at most 1.1 % less
    noise for multipliers that span a factor of two). Losses beyond about 10^5 get an infinite epsilon.

    Args:
        neighbors: the neighboring relation.
        interval: finest default spacing of the loss grid, in units of epsilon.

    Raises:
        ValueError: ``interval`` is not in (0, 0.1].
    """

    name = "pld"

    def __init__(self, neighbors: Neighbors = Neighbors.ADD_OR_REMOVE_ONE, *, interval: float = BASE_INTERVAL) -> None:
        super().__init__(neighbors)
        if isinstance(interval, bool) or not 0.0 < interval <= 0.1:
            raise ValueError(f"PldAccountant: expected interval in (0, 0.1], got {interval!r}")
        self._interval = float(interval)
        self._composed: tuple[tuple[tuple[Event, int], ...], tuple[Any, float] | None] | None = None

    def empty(self, *, draft: bool = False) -> PldAccountant:
        coarser = min(self._interval * _DRAFT_COARSENING, 0.1) if draft else self._interval
        return type(self)(self._neighbors, interval=coarser)

    def supports(self, event: Event) -> bool:
        try:
            basic_mechanisms([(event, 1)])
        except UnsupportedEvent:
            return False
        return True

    def _epsilon(self, delta: float) -> float:
        loss, allowance = self._distribution()
        if loss is None:
            return 0.0 if allowance == 0.0 else math.inf
        usable = delta - allowance
        if usable <= 0.0:
            return math.inf
        if loss.get_delta_for_epsilon(0.0) <= usable:
            return 0.0
        epsilon = float(loss.get_epsilon_for_delta(usable))
        step = 1e-12
        while math.isfinite(epsilon) and loss.get_delta_for_epsilon(epsilon) > usable:
            epsilon += step * max(1.0, epsilon)  # the closed form above rounds; settle on the proven side
            step *= 2.0
        return epsilon

    def _delta(self, epsilon: float) -> float:
        loss, allowance = self._distribution()
        if loss is None:
            return 0.0 if allowance == 0.0 else 1.0
        return min(1.0, float(loss.get_delta_for_epsilon(epsilon)) + allowance)

    def _distribution(self) -> tuple[Any, float]:
        """(loss distribution, delta to hold back); (None, 0): nothing leaks, (None, inf): no proof."""
        ledger = self.ledger
        if self._composed is None or self._composed[0] != ledger:
            self._composed = (ledger, _compose(ledger, self._neighbors, self._interval))
        composed = self._composed[1]
        return (None, math.inf) if composed is None else composed


def _compose(ledger: tuple[tuple[Event, int], ...], neighbors: Neighbors, base: float) -> tuple[Any, float] | None:
    exact = basic_mechanisms(ledger)
    if not exact:
        return None, 0.0
    if min(noise_multiplier(m) for m in exact) < 1e-150:
        return None
    interval = grid_interval(exact, replace_one=neighbors is Neighbors.REPLACE_ONE, base=base)
    if interval is None:
        return None
    merged = merge_similar(exact, _MOST_MECHANISMS)
    steps = sum(merged.values())
    allowance = _ROUNDING_PER_STEP * (steps + _ROUNDING_STEPS)
    total: Any = None
    with np.errstate(all="ignore"):
        for mechanism, count in merged.items():
            loss, leak = _single(mechanism, interval, neighbors)
            allowance += leak * count
            composed = loss if count == 1 else loss.self_compose(count)
            total = composed if total is None else total.compose(composed)
        mass = float(total.get_delta_for_epsilon(-math.inf))
    # A lost or non-finite probability would turn the upper bound into a guess.
    return (total, allowance) if mass >= 1.0 - allowance - 1e-9 and math.isfinite(mass) else None


@functools.lru_cache(maxsize=16)
def _single(mechanism: Event, interval: float, neighbors: Neighbors) -> tuple[Any, float]:
    """(loss distribution of one step, delta by which it may fail to dominate)."""
    match mechanism:
        case Gaussian(noise_multiplier=z):
            return _gaussian(z, 1.0, interval, neighbors), 0.0
        case PoissonSampled(event=Gaussian(noise_multiplier=z), sampling_prob=q):
            return _gaussian(z, q, interval, neighbors), 0.0
        case TruncatedPoissonSampled():
            return _truncated(mechanism, interval, neighbors)
    raise UnsupportedEvent(f"pld: expected a basic mechanism, got {mechanism!r}")


def _gaussian(z: float, q: float, interval: float, neighbors: Neighbors) -> Any:
    from dp_accounting import NeighboringRelation  # slow to import, so only when asked for a number
    from dp_accounting.pld import privacy_loss_distribution

    relation = {
        Neighbors.ADD_OR_REMOVE_ONE: NeighboringRelation.ADD_OR_REMOVE_ONE,
        Neighbors.REPLACE_ONE: NeighboringRelation.REPLACE_ONE,
    }[neighbors]
    loss = privacy_loss_distribution.from_gaussian_mechanism(
        z,
        sampling_prob=q,
        value_discretization_interval=interval,
        neighboring_relation=relation,
        pessimistic_estimate=True,
        use_connect_dots=True,
    )
    # Mixing it with itself changes nothing but the storage, from sparse to dense: composing a sparse one n
    # times first raises its size to the power n in exact integers, which takes seconds for n in the millions.
    return loss.compute_mixture(loss, 0.5)


def _truncated(mechanism: TruncatedPoissonSampled, interval: float, neighbors: Neighbors) -> tuple[Any, float]:
    """Truncated Poisson sampling, after Ganesh et al., arXiv 2508.15089, valid for every size up to N.

    Let K of the other m-1 <= N-1 examples be drawn and B be the limit. If K < B the example at hand truncates
    nothing: plain Poisson sampling. If K >= B it is in the batch with probability at most q, and then
    displaces another one, so the sum moves by at most twice the bound; the replace-one pair at half the
    multiplier covers that under both relations. Whether K >= B has the same probability p in both worlds, so
    revealing it can only help the adversary: the loss is the p-mixture of the two. p grows with m and the
    second pair dominates the first, so p = P[Binomial(N-1, q) >= B] covers all m <= N. (dp-accounting's own
    event sharpens q in the second pair to its exact value at m = N, which then holds for that size only.)
    """
    from scipy.stats import binom

    z, q = noise_multiplier(mechanism), mechanism.sampling_prob
    tail = float(binom.sf(mechanism.max_batch_size - 1, mechanism.dataset_size - 1, q))
    if not 0.0 <= tail <= 1.0:
        tail = 1.0
    p = min(1.0, tail * (1.0 + 1e-9))
    plain = _gaussian(z, q, interval, neighbors)
    if p < _NEGLIGIBLE:
        return plain, p + 1e-300
    displaced = _gaussian(z / 2.0, q, interval, Neighbors.REPLACE_ONE)
    return displaced.compute_mixture(plain, p), 0.0
