# SPDX-License-Identifier: Apache-2.0
"""Truncated Poisson sampling: against dp-accounting's event, a full enumeration, and every smaller size."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import NeighboringRelation as Relation
from scipy.stats import binom

from accountants import Gaussian, Neighbors, PldAccountant, PoissonSampled, TruncatedPoissonSampled
from accountants.pld import _gaussian
from tests.accountants.exact import hockey_stick, mixture

RELATIONS = {
    Neighbors.ADD_OR_REMOVE_ONE: Relation.ADD_OR_REMOVE_ONE,
    Neighbors.REPLACE_ONE: Relation.REPLACE_ONE,
}


def theirs(neighbors: Neighbors, size: int, q: float, limit: int, z: float, steps: int) -> float:
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(size, q, limit, z)
    accountant = dp_accounting.pld.PLDAccountant(RELATIONS[neighbors], value_discretization_interval=2e-4)
    return float(accountant.compose(event, steps).get_epsilon(1e-5))


def test_golden() -> None:
    def epsilon(limit: int) -> float:
        step = TruncatedPoissonSampled(Gaussian(1.0), 0.01, 60000, limit)
        return PldAccountant().compose(step, 1000).epsilon(1e-5)

    assert 1.8785 <= epsilon(700) <= 1.881
    assert 1.828243 <= epsilon(800) <= 1.8284
    plain = PldAccountant().compose(PoissonSampled(Gaussian(1.0), 0.01), 1000).epsilon(1e-5)
    assert epsilon(60000) == plain
    assert epsilon(700) > epsilon(800) >= plain - 1e-9


@pytest.mark.parametrize("neighbors", Neighbors)
@pytest.mark.parametrize(("q", "z", "limit"), [(0.3, 2.0, 300), (0.01, 1.5, 3)])
def test_covers_every_smaller_data_set(neighbors: Neighbors, q: float, z: float, limit: int) -> None:
    size, steps = 1000, 20
    step = TruncatedPoissonSampled(Gaussian(z), q, size, limit)
    ours = PldAccountant(neighbors).compose(step, steps).epsilon(1e-5)
    for smaller in (1000, 400):
        assert ours >= theirs(neighbors, smaller, q, limit, z, steps) - 1e-6


def test_against_the_mechanism_itself() -> None:
    # Four or three examples, at most one used. The one that differs has value +1, the others -1: with it in
    # the batch one of the others is out, so the sum moves by 2.
    q, z, limit, others = 0.9, 0.5, 1, 3

    def output(with_it: bool) -> tuple[list[float], list[float]]:
        weights: dict[float, float] = {}
        for drawn in range(others + 1):
            chance = float(binom.pmf(drawn, others, q))
            plain = -float(min(drawn, limit))
            if not with_it:
                weights[plain] = weights.get(plain, 0.0) + chance
                continue
            kept = min(1.0, limit / (drawn + 1))
            taken = 1.0 - float(min(drawn, limit - 1))
            for value, p in ((plain, 1 - q + q * (1 - kept)), (taken, q * kept)):
                weights[value] = weights.get(value, 0.0) + chance * p
        return list(weights.values()), list(weights)

    with_it, without = (mixture(*output(b), z) for b in (True, False))
    accountant = PldAccountant().compose(TruncatedPoissonSampled(Gaussian(z), q, others + 1, limit))
    plain = PldAccountant().compose(PoissonSampled(Gaussian(z), q))
    broken = False
    for epsilon in (0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0):
        truth = max(
            hockey_stick(with_it, without, epsilon, z, shift=4.0),
            hockey_stick(without, with_it, epsilon, z, shift=4.0),
        )
        assert truth <= accountant.delta(epsilon) + 1e-10
        broken = broken or truth > plain.delta(epsilon) + 1e-6
    assert broken, "the example does not show why truncation needs its own event"


@pytest.mark.parametrize("neighbors", Neighbors)
@pytest.mark.parametrize(("q", "z"), [(0.01, 1.0), (0.3, 1.5), (0.9, 4.0)])
def test_displacing_dominates_plain_sampling(neighbors: Neighbors, q: float, z: float) -> None:
    # The bound on the probability of truncation may be too large only because of this.
    plain = _gaussian(z, q, 1e-3, neighbors)
    displaced = _gaussian(z / 2, q, 1e-3, Neighbors.REPLACE_ONE)
    for epsilon in np.linspace(-3.0, 6.0, 46):
        assert displaced.get_delta_for_epsilon(float(epsilon)) >= (plain.get_delta_for_epsilon(float(epsilon)) - 1e-9)


def test_certain_truncation_and_extreme_sizes() -> None:
    def epsilon(q: float, size: int, limit: int) -> float:
        step = TruncatedPoissonSampled(Gaussian(3.0), q, size, limit)
        return PldAccountant().compose(step).epsilon(1e-5)

    always = epsilon(1.0, 100, 1)
    assert epsilon(1.0, 100, 100) < always < math.inf
    assert epsilon(0.0, 100, 1) == 0.0
    assert epsilon(1e-12, 10**9, 10**6) == 0.0
    assert epsilon(0.5, 2, 1) < math.inf
