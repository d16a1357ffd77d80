# SPDX-License-Identifier: Apache-2.0
"""The RDP accountant: above PLD and the exact curve, and silent about what it leaves out."""

from __future__ import annotations

import logging
import math

import pytest

from accountants import (
    Accountant,
    Event,
    Gaussian,
    Neighbors,
    PldAccountant,
    PoissonSampled,
    RdpAccountant,
    Sequence,
    TruncatedPoissonSampled,
    UnsupportedEvent,
)
from tests.accountants.contract import AccountantContract
from tests.accountants.exact import gaussian_epsilon


class TestContract(AccountantContract):
    def make(self) -> Accountant:
        return RdpAccountant()

    def event(self) -> Event:
        return PoissonSampled(Gaussian(1.0), 0.1)

    def cheaper(self) -> Event:
        return PoissonSampled(Gaussian(2.0), 0.05)


class TestContractReplaceOne(AccountantContract):
    def make(self) -> Accountant:
        return RdpAccountant(Neighbors.REPLACE_ONE)


@pytest.mark.parametrize(
    ("q", "z", "steps", "delta", "expected"),
    [
        (0.01, 1.0, 1000, 1e-5, 2.10137),
        (256 / 60000, 0.8, 4700, 1e-5, 3.03071),
        (0.1, 5.0, 10000, 1e-6, 11.8729),
        (1.0, 20.0, 100, 1e-5, 2.16572),
        (0.001, 0.5, 100000, 1e-6, 16.3352),
    ],
)
def test_golden_and_above_pld(q: float, z: float, steps: int, delta: float, expected: float) -> None:
    step = PoissonSampled(Gaussian(z), q)
    epsilon = RdpAccountant().compose(step, steps).epsilon(delta)
    assert epsilon == pytest.approx(expected, rel=2e-3)
    assert epsilon >= PldAccountant().compose(step, steps).epsilon(delta)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-10, 1e-30])
@pytest.mark.parametrize("z", [0.3, 2.0, 30.0, 500.0])
@pytest.mark.parametrize(("neighbors", "sensitivity"), [*zip(Neighbors, (1.0, 2.0), strict=True)])
def test_above_the_exact_gaussian(z: float, delta: float, neighbors: Neighbors, sensitivity: float) -> None:
    exact = gaussian_epsilon(z, delta, sensitivity)
    epsilon = RdpAccountant(neighbors).compose(Gaussian(z)).epsilon(delta)
    assert exact <= epsilon <= 1.5 * exact + 0.01


def test_small_budgets_are_within_reach() -> None:
    step = PoissonSampled(Gaussian(19.0), 256 / 60000)
    assert 0.04 < RdpAccountant().compose(step, 4700).epsilon(1e-5) <= 0.05


@pytest.mark.parametrize(
    "event",
    [
        TruncatedPoissonSampled(Gaussian(1.0), 0.1, 100, 20),
        Sequence((Gaussian(1.0), TruncatedPoissonSampled(Gaussian(1.0), 0.1, 100, 20))),
    ],
)
def test_refuses_truncation(event: Event) -> None:
    with pytest.raises(UnsupportedEvent):
        RdpAccountant().compose(event)


def test_refuses_sampling_when_one_is_replaced() -> None:
    accountant = RdpAccountant(Neighbors.REPLACE_ONE)
    with pytest.raises(UnsupportedEvent, match="replace_one"):
        accountant.compose(PoissonSampled(Gaussian(1.0), 0.1))
    accountant.compose(PoissonSampled(Gaussian(1.0), 1.0))
    assert accountant.epsilon(1e-5) == RdpAccountant(Neighbors.REPLACE_ONE).compose(Gaussian(1.0)).epsilon(1e-5)


def test_orders_that_do_not_converge_are_left_out_silently(caplog: pytest.LogCaptureFixture) -> None:
    step = PoissonSampled(Gaussian(0.05), 0.5)
    with caplog.at_level(logging.WARNING):
        epsilon = RdpAccountant().compose(step, 3).epsilon(1e-5)
        logging.getLogger("absl").warning("something else")
    assert [r.message for r in caplog.records] == ["something else"]
    assert epsilon >= PldAccountant().compose(step, 3).epsilon(1e-5)


@pytest.mark.parametrize("z", [1e4, 1e9, 1e100])
def test_tiny_losses_do_not_vanish_or_fail(z: float) -> None:
    for event in (Gaussian(z), PoissonSampled(Gaussian(z), 1e-6)):
        accountant = RdpAccountant().compose(event)
        assert 0.0 <= accountant.epsilon(1e-5) < 0.01
        assert 0.0 < accountant.delta(0.0) < 0.01
        assert math.isfinite(accountant.epsilon(1e-12))
