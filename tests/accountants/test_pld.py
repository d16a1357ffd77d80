# SPDX-License-Identifier: Apache-2.0
"""The PLD accountant against closed forms, quadrature and published numbers: never below, and close."""

from __future__ import annotations

import math

import pytest

from accountants import (
    Accountant,
    Event,
    Gaussian,
    Neighbors,
    PldAccountant,
    PoissonSampled,
    Repeat,
    Sequence,
    TruncatedPoissonSampled,
    UnsupportedEvent,
)
from tests.accountants.contract import AccountantContract
from tests.accountants.exact import (
    gaussian_delta,
    gaussian_epsilon,
    hockey_stick,
    hockey_stick_twice,
    mixture,
)


class TestContract(AccountantContract):
    def make(self) -> Accountant:
        return PldAccountant()


class TestContractSampledReplaceOne(AccountantContract):
    def make(self) -> Accountant:
        return PldAccountant(Neighbors.REPLACE_ONE)

    def event(self) -> Event:
        return PoissonSampled(Gaussian(1.0), 0.1)

    def cheaper(self) -> Event:
        return TruncatedPoissonSampled(Gaussian(2.0), 0.05, 1000, 80)


# sampling_prob, noise_multiplier, steps, delta, epsilon of dp-accounting at spacing 1e-4. With q = 1 there is
# a closed form; the others lie inside the brackets of an independent accountant (PRV).
GOLDEN = [
    (0.01, 1.0, 1000, 1e-5, 1.828244),
    (256 / 60000, 0.8, 4700, 1e-5, 2.600066),
    (0.1, 5.0, 10000, 1e-6, 11.160551),
    (1.0, 20.0, 100, 1e-5, 1.993091),
    (0.001, 0.5, 100000, 1e-6, 14.733378),
]


@pytest.mark.parametrize(("q", "z", "steps", "delta", "expected"), GOLDEN)
def test_golden(q: float, z: float, steps: int, delta: float, expected: float) -> None:
    epsilon = PldAccountant().compose(PoissonSampled(Gaussian(z), q), steps).epsilon(delta)
    # The finest known answers carry an excess of up to 2e-6 themselves.
    assert expected - 3e-6 <= epsilon <= expected + 1e-3


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-8, 1e-10])
@pytest.mark.parametrize("z", [0.5, 1.0, 4.0, 50.0])
def test_gaussian_is_above_the_exact_curve_and_close(z: float, delta: float) -> None:
    accountant = PldAccountant().compose(Gaussian(z * 10), 100)
    exact = gaussian_epsilon(z, delta)
    epsilon = accountant.epsilon(delta)
    assert exact <= epsilon <= exact + 1e-3
    assert gaussian_delta(z, epsilon) <= delta
    assert accountant.delta(epsilon) <= delta * (1 + 1e-9)
    assert gaussian_delta(z, 0.7) <= accountant.delta(0.7) <= gaussian_delta(z, 0.7) + 1e-4


@pytest.mark.parametrize("delta", [1e-5, 1e-8, 1e-10, 1e-12])
@pytest.mark.parametrize("steps", [3, 1000, 20000])
def test_small_delta_after_many_convolutions(steps: int, delta: float) -> None:
    # Sampled with a probability one rounding error short of 1, so that the steps are truly convolved.
    step = PoissonSampled(Gaussian(2.0 * math.sqrt(steps)), 1.0 - 2.0**-53)
    epsilon = PldAccountant().compose(step, steps).epsilon(delta)
    assert epsilon >= gaussian_epsilon(2.0, delta)
    if delta >= 1e-10 and steps <= 1000:
        assert epsilon <= gaussian_epsilon(2.0, delta) + 0.01


def test_delta_below_the_arithmetic_is_not_proven() -> None:
    accountant = PldAccountant().compose(PoissonSampled(Gaussian(1.0), 0.01), 100_000)
    assert accountant.epsilon(1e-11) == math.inf
    assert accountant.epsilon(1e-9) < math.inf
    assert PldAccountant().compose(Gaussian(5.0)).epsilon(1e-20) == math.inf


@pytest.mark.parametrize(("q", "z"), [(0.1, 1.0), (0.5, 0.6), (0.9, 3.0), (0.01, 0.4)])
@pytest.mark.parametrize("neighbors", Neighbors)
def test_one_sampled_step_against_quadrature(q: float, z: float, neighbors: Neighbors) -> None:
    accountant = PldAccountant(neighbors).compose(PoissonSampled(Gaussian(z), q))
    zero, plus = mixture([1.0], [0.0], z), mixture([1 - q, q], [0.0, 1.0], z)
    minus = mixture([1 - q, q], [0.0, -1.0], z)
    pairs = [(plus, zero), (zero, plus)] if neighbors is Neighbors.ADD_OR_REMOVE_ONE else [(plus, minus)]
    for epsilon in (0.0, 0.05, 0.3, 1.0, 3.0):
        truth = max(hockey_stick(a, b, epsilon, z) for a, b in pairs)
        assert truth - 1e-10 <= accountant.delta(epsilon) <= truth + 1e-7 + 1e-3 * truth


@pytest.mark.parametrize(("q", "z"), [(0.3, 0.8), (0.05, 1.5)])
def test_two_sampled_steps_against_quadrature(q: float, z: float) -> None:
    accountant = PldAccountant().compose(PoissonSampled(Gaussian(z), q), 2)
    zero, plus = mixture([1.0], [0.0], z), mixture([1 - q, q], [0.0, 1.0], z)
    for epsilon in (0.0, 0.2, 1.0):
        truth = max(hockey_stick_twice(plus, zero, epsilon, z), hockey_stick_twice(zero, plus, epsilon, z))
        assert truth - 1e-6 <= accountant.delta(epsilon) <= truth + 1e-5


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_replacing_doubles_the_sensitivity(delta: float) -> None:
    epsilon = PldAccountant(Neighbors.REPLACE_ONE).compose(Gaussian(4.0)).epsilon(delta)
    exact = gaussian_epsilon(4.0, delta, sensitivity=2.0)
    assert exact <= epsilon <= exact + 1e-3
    assert epsilon > 1.5 * PldAccountant().compose(Gaussian(4.0)).epsilon(delta)


@pytest.mark.parametrize(("q", "z"), [(0.1, 1.0), (0.4, 0.7)])
def test_no_other_pair_of_examples_is_worse_than_opposite_ones(q: float, z: float) -> None:
    accountant = PldAccountant(Neighbors.REPLACE_ONE).compose(PoissonSampled(Gaussian(z), q))
    for v in (-1.0, -0.5, 0.0, 0.3, 1.0):
        for w in (-1.0, -0.7, 0.0, 0.6):
            a, b = mixture([1 - q, q], [0.0, v], z), mixture([1 - q, q], [0.0, w], z)
            for epsilon in (0.0, 0.1, 0.7):
                assert hockey_stick(a, b, epsilon, z) <= accountant.delta(epsilon) + 1e-10


def test_several_gaussians_on_one_draw_are_joint() -> None:
    # Four layers, each with half the privacy of a release at multiplier 1.
    layers = (2.0, 2.0, 2.0, 2.0)
    q, steps, delta = 0.01, 1000, 1e-5
    truth = PldAccountant().compose(PoissonSampled(Gaussian(1.0), q), steps).epsilon(delta)
    for inner in (Gaussian.joint(*layers), Sequence(tuple(map(Gaussian, layers))), Repeat(Gaussian(2.0), 4)):
        event = PoissonSampled(inner, q)
        assert PldAccountant().compose(event, steps).epsilon(delta) == pytest.approx(truth, rel=1e-9)
    # Pretending that each layer had its own draw claims far too much.
    separate = PldAccountant()
    for z in layers:
        separate.compose(PoissonSampled(Gaussian(z), q), steps)
    assert separate.epsilon(delta) < 0.9 * truth


def test_joint_gaussian_matches_the_two_dimensional_mechanism() -> None:
    # Two coordinates, shifted by (1, 1) with probability q, noise (z1, z2): Monte Carlo of the likelihood.
    import numpy as np

    q, z1, z2, epsilon = 0.3, 1.2, 2.0, 0.4
    rng = np.random.default_rng(0)
    n = 1_000_000
    hit = rng.random(n) < q
    x, y = rng.normal(hit, z1), rng.normal(hit, z2)
    ratio = 1 - q + q * np.exp((x - 0.5) / z1**2 + (y - 0.5) / z2**2)
    gain = np.maximum(0.0, 1 - math.exp(epsilon) / ratio)
    error = float(gain.std()) / math.sqrt(n)
    delta = PldAccountant().compose(PoissonSampled(Gaussian.joint(z1, z2), q)).delta(epsilon)
    assert abs(delta - float(gain.mean())) < 5 * error


def test_mixed_ledgers_add_up() -> None:
    # An unsampled release before, between and after sampled steps is the same as all of them at the end.
    step, once = PoissonSampled(Gaussian(1.0), 0.02), Gaussian(10.0)
    spread = PldAccountant().compose(once).compose(step, 50).compose(once).compose(step, 50)
    merged = PldAccountant().compose(step, 100).compose(Gaussian.joint(10.0, 10.0))
    assert spread.epsilon(1e-5) == pytest.approx(merged.epsilon(1e-5), rel=1e-9)
    assert spread.epsilon(1e-5) > PldAccountant().compose(step, 100).epsilon(1e-5)


def test_extremes() -> None:
    delta = 1e-5
    for z in (0.0, 1e-300, 1e-6):
        assert PldAccountant().compose(Gaussian(z)).epsilon(delta) == math.inf
    assert PldAccountant().compose(PoissonSampled(Gaussian(0.0), 0.0)).epsilon(delta) == 0.0
    assert PldAccountant().compose(PoissonSampled(Gaussian(1e100), 0.5), 10).epsilon(delta) == 0.0
    assert PldAccountant().compose(PoissonSampled(Sequence(()), 0.5)).epsilon(delta) == 0.0
    exact = gaussian_epsilon(0.02, delta)
    assert exact <= PldAccountant().compose(Gaussian(0.02)).epsilon(delta) <= exact * 1.001
    assert PldAccountant().compose(PoissonSampled(Gaussian(1.0), 1e-300), 10).epsilon(delta) == 0.0


def test_sampling_a_sampled_event_is_refused() -> None:
    with pytest.raises(UnsupportedEvent):
        PldAccountant().compose(PoissonSampled(PoissonSampled(Gaussian(1.0), 0.5), 0.5))


@pytest.mark.parametrize("bad", [0.0, -1e-4, 1.0, math.nan, True])
def test_bad_interval(bad: float) -> None:
    with pytest.raises(ValueError, match="interval"):
        PldAccountant(interval=bad)


def test_a_longer_run_is_never_cheaper_even_where_the_grid_changes() -> None:
    for step in (PoissonSampled(Gaussian(0.6), 0.02), PoissonSampled(Gaussian(20.0), 0.002)):
        values = [PldAccountant().compose(step, 4**k).epsilon(1e-5) for k in range(9)]
        assert values == sorted(values)
