# SPDX-License-Identifier: Apache-2.0
"""The exact reductions of a ledger."""

from __future__ import annotations

import pytest

from accountants import (
    Event,
    Gaussian,
    PoissonSampled,
    Repeat,
    Sequence,
    TruncatedPoissonSampled,
    UnsupportedEvent,
)
from accountants.mechanisms import basic_mechanisms, noise_multiplier

STEP = PoissonSampled(Gaussian(2.0), 0.1)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Repeat(Sequence((STEP, Repeat(STEP, 4))), 3), {STEP: 15}),
        (Sequence((Gaussian(3.0), STEP, Gaussian(4.0))), {STEP: 1, Gaussian(2.4000000000000004): 1}),
        (PoissonSampled(Gaussian(2.0), 1.0), {Gaussian(2.0): 1}),
        (PoissonSampled(Gaussian(0.0), 0.0), {}),
        (PoissonSampled(Repeat(Gaussian(4.0), 4), 0.1), {STEP: 1}),
        (TruncatedPoissonSampled(Gaussian(2.0), 0.1, 50, 50), {STEP: 1}),
        (TruncatedPoissonSampled(Gaussian(2.0), 1.0, 50, 60), {Gaussian(2.0): 1}),
        (Sequence(()), {}),
    ],
)
def test_reductions(event: Event, expected: dict[Event, int]) -> None:
    got = basic_mechanisms([(event, 1)])
    assert {k: v for k, v in got.items() if not isinstance(k, Gaussian)} == {
        k: v for k, v in expected.items() if not isinstance(k, Gaussian)
    }
    assert [noise_multiplier(k) for k in got if isinstance(k, Gaussian)] == pytest.approx(
        [noise_multiplier(k) for k in expected if isinstance(k, Gaussian)], rel=1e-14
    )


def test_a_binding_limit_is_kept() -> None:
    event = TruncatedPoissonSampled(Sequence((Gaussian(3.0), Gaussian(4.0))), 1.0, 50, 49)
    (got,) = basic_mechanisms([(event, 1)])
    assert isinstance(got, TruncatedPoissonSampled)
    assert noise_multiplier(got) == pytest.approx(2.4, rel=1e-14)


@pytest.mark.parametrize(
    "event", [PoissonSampled(STEP, 0.5), TruncatedPoissonSampled(Repeat(STEP, 2), 0.5, 10, 5), STEP]
)
def test_sampling_twice_is_refused(event: Event) -> None:
    if event is STEP:
        with pytest.raises(UnsupportedEvent):
            noise_multiplier(Repeat(STEP, 2))
    else:
        with pytest.raises(UnsupportedEvent):
            basic_mechanisms([(event, 1)])
