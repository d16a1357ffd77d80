# SPDX-License-Identifier: Apache-2.0
"""Calibration returns the safe end of a tight bracket, or says why it cannot."""

from __future__ import annotations

import math
from typing import Any

import pytest

from accountants import (
    Event,
    Gaussian,
    Neighbors,
    PoissonSampled,
    Repeat,
    Sequence,
    TruncatedPoissonSampled,
    UnsupportedEvent,
    calibrate_noise_multiplier,
    calibrate_steps,
    make_accountant,
)
from tests.accountants.exact import gaussian_epsilon


def spent(event: Event, delta: float, accountant: str, neighbors: Neighbors) -> float:
    return make_accountant(accountant, neighbors).compose(event).epsilon(delta)


@pytest.mark.parametrize(
    ("q", "steps", "epsilon", "accountant", "neighbors"),
    [
        (8192 / 60000, 200, 3.0, "pld", Neighbors.ADD_OR_REMOVE_ONE),
        (8192 / 60000, 200, 3.0, "pld", Neighbors.REPLACE_ONE),
        (4096 / 60000, 150, 3.0, "rdp", Neighbors.ADD_OR_REMOVE_ONE),
        (256 / 60000, 4700, 3.0, "pld", Neighbors.ADD_OR_REMOVE_ONE),
        (256 / 60000, 4700, 0.05, "pld", Neighbors.ADD_OR_REMOVE_ONE),
        (256 / 60000, 4700, 0.05, "rdp", Neighbors.ADD_OR_REMOVE_ONE),
        (0.5, 10, 50.0, "pld", Neighbors.ADD_OR_REMOVE_ONE),
        (1.0, 10, 0.5, "rdp", Neighbors.REPLACE_ONE),
    ],
)
def test_the_safe_end_and_no_more(q: float, steps: int, epsilon: float, accountant: str, neighbors: Neighbors) -> None:
    def run(z: float) -> Event:
        return Repeat(PoissonSampled(Gaussian(z), q), steps)

    z = calibrate_noise_multiplier(run, epsilon=epsilon, delta=1e-5, accountant=accountant, neighbors=neighbors)
    assert spent(run(z), 1e-5, accountant, neighbors) <= epsilon
    assert spent(run(z * (1 - 2e-4)), 1e-5, accountant, neighbors) > epsilon


def test_small_budget_does_not_waste_noise() -> None:
    # A search with an absolute tolerance of 0.01 in epsilon may return 25.0 here; 17.16 is known to do.
    z = calibrate_noise_multiplier(
        lambda z: Repeat(PoissonSampled(Gaussian(z), 256 / 60000), 4700), epsilon=0.05, delta=1e-5
    )
    assert 16.5 < z < 17.16


def test_against_the_exact_gaussian() -> None:
    for epsilon, delta in ((0.1, 1e-6), (1.0, 1e-5), (8.0, 1e-9), (60.0, 1e-5)):
        z = calibrate_noise_multiplier(Gaussian, epsilon=epsilon, delta=delta)
        assert gaussian_epsilon(z, delta) <= epsilon
        assert gaussian_epsilon(z * 0.999, delta) > epsilon


def test_a_whole_plan_with_a_second_release() -> None:
    def plan(z: float) -> Event:
        step = TruncatedPoissonSampled(Gaussian.joint(z, 3 * z), 0.2, 500, 130)
        return Sequence((Repeat(step, 100), Gaussian(30.0)))

    z = calibrate_noise_multiplier(plan, epsilon=1.0, delta=1e-5, tolerance=1e-3)
    assert spent(plan(z), 1e-5, "pld", Neighbors.ADD_OR_REMOVE_ONE) <= 1.0
    assert spent(plan(z * 0.998), 1e-5, "pld", Neighbors.ADD_OR_REMOVE_ONE) > 1.0


def test_unreachable_and_trivial_budgets_are_errors() -> None:
    with pytest.raises(ValueError, match="no multiplier"):
        calibrate_noise_multiplier(lambda z: Sequence((Gaussian(z), Gaussian(1.0))), epsilon=0.5, delta=1e-5)
    with pytest.raises(ValueError, match="make_event"):
        calibrate_noise_multiplier(lambda z: Gaussian(100.0), epsilon=1.0, delta=1e-5)
    with pytest.raises(UnsupportedEvent):
        calibrate_noise_multiplier(
            lambda z: PoissonSampled(Gaussian(z), 0.1),
            epsilon=1.0,
            delta=1e-5,
            accountant="rdp",
            neighbors=Neighbors.REPLACE_ONE,
        )


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"epsilon": True},
        {"delta": 0.0},
        {"delta": 1.0},
        {"accountant": "gdp"},
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"tolerance": math.nan},
    ],
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        calibrate_noise_multiplier(Gaussian, **({"epsilon": 1.0, "delta": 1e-5} | bad))
    if "tolerance" not in bad:
        with pytest.raises(ValueError):
            calibrate_steps(Gaussian(10.0), **({"epsilon": 1.0, "delta": 1e-5} | bad))


@pytest.mark.parametrize(
    ("step", "epsilon", "accountant"),
    [
        (PoissonSampled(Gaussian(2.0), 0.05), 2.0, "pld"),
        (PoissonSampled(Gaussian(1.0), 0.01), 2.0, "rdp"),
        (PoissonSampled(Gaussian(8.0), 0.001), 0.05, "pld"),
        (Gaussian(10.0), 5.0, "pld"),
        (TruncatedPoissonSampled(Gaussian(4.0), 0.1, 6000, 650), 1.0, "pld"),
    ],
)
def test_most_steps(step: Event, epsilon: float, accountant: str) -> None:
    steps = calibrate_steps(step, epsilon=epsilon, delta=1e-5, accountant=accountant)
    assert steps > 0
    relation = Neighbors.ADD_OR_REMOVE_ONE
    assert spent(Repeat(step, steps), 1e-5, accountant, relation) <= epsilon
    assert spent(Repeat(step, steps + 1), 1e-5, accountant, relation) > epsilon


def test_steps_at_the_ends() -> None:
    assert calibrate_steps(Gaussian(0.5), epsilon=1.0, delta=1e-5) == 0
    assert calibrate_steps(Gaussian(0.0), epsilon=1.0, delta=1e-5) == 0
    # One step at multiplier 4 costs 1.0126 by RDP and 1.00 is not enough for it.
    one = spent(Gaussian(4.0), 1e-5, "pld", Neighbors.ADD_OR_REMOVE_ONE)
    assert calibrate_steps(Gaussian(4.0), epsilon=one, delta=1e-5) == 1
    with pytest.raises(ValueError, match="costs nothing"):
        calibrate_steps(PoissonSampled(Gaussian(1.0), 0.0), epsilon=1.0, delta=1e-5)
    with pytest.raises(UnsupportedEvent):
        calibrate_steps(TruncatedPoissonSampled(Gaussian(1.0), 0.1, 100, 20), epsilon=1.0, delta=1e-5, accountant="rdp")
