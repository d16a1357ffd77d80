# SPDX-License-Identifier: Apache-2.0
"""Events validate themselves, cannot be changed, and survive JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from accountants import (
    Event,
    Gaussian,
    PoissonSampled,
    Repeat,
    Sequence,
    TruncatedPoissonSampled,
    event_from_dict,
)

EVENTS = [
    Gaussian(1.1),
    Gaussian(0),
    PoissonSampled(Gaussian(0.7), 0.25),
    TruncatedPoissonSampled(Gaussian(0.7), 1 / 3, 60000, 700),
    Repeat(PoissonSampled(Gaussian(0.1 + 0.2), 1), 10**12),
    Sequence((Gaussian(2.0), Repeat(Gaussian(3.0), 2), Sequence(()))),
]


@pytest.mark.parametrize("event", EVENTS, ids=repr)
def test_round_trip_is_exact(event: Event) -> None:
    assert event_from_dict(json.loads(json.dumps(event.to_dict()))) == event


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf, True, "1", None, 1j, np.bool_(True)])
def test_bad_noise_multiplier(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"Gaussian\.noise_multiplier"):
        Gaussian(bad)


@pytest.mark.parametrize("bad", [-0.1, 1.0000001, math.nan, math.inf, True, "0.1", None])
def test_bad_sampling_prob(bad: Any) -> None:
    with pytest.raises(ValueError, match="sampling_prob"):
        PoissonSampled(Gaussian(1.0), bad)
    with pytest.raises(ValueError, match="sampling_prob"):
        TruncatedPoissonSampled(Gaussian(1.0), bad, 10, 5)


@pytest.mark.parametrize("bad", [0, -1, 1.0, math.nan, True, "3", None])
def test_bad_counts(bad: Any) -> None:
    with pytest.raises(ValueError, match="count"):
        Repeat(Gaussian(1.0), bad)
    with pytest.raises(ValueError, match="dataset_size"):
        TruncatedPoissonSampled(Gaussian(1.0), 0.1, bad, 5)
    with pytest.raises(ValueError, match="max_batch_size"):
        TruncatedPoissonSampled(Gaussian(1.0), 0.1, 10, bad)


@pytest.mark.parametrize("bad", [1.0, None, "gaussian", {"kind": "gaussian"}])
def test_bad_inner_event(bad: Any) -> None:
    for build in (
        lambda: PoissonSampled(bad, 0.1),
        lambda: TruncatedPoissonSampled(bad, 0.1, 10, 5),
        lambda: Repeat(bad, 2),
        lambda: Sequence((Gaussian(1.0), bad)),
    ):
        with pytest.raises(ValueError, match="Event"):
            build()


def test_numpy_numbers_become_plain_ones() -> None:
    event = Repeat(PoissonSampled(Gaussian(np.float32(0.5)), np.float64(0.25)), np.int64(3))
    assert json.loads(json.dumps(event.to_dict()))["count"] == 3
    assert event == Repeat(PoissonSampled(Gaussian(0.5), 0.25), 3)


def test_events_are_frozen_and_hashable() -> None:
    event = Gaussian(1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.noise_multiplier = 9.0  # type: ignore[misc]
    assert len({Gaussian(1), Gaussian(1.0), Gaussian(2.0)}) == 2
    assert Sequence([Gaussian(1.0)]) == Sequence((Gaussian(1.0),))  # type: ignore[arg-type]
    assert hash(Sequence([Gaussian(1.0)])) == hash(Sequence((Gaussian(1.0),)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad",
    [
        {},
        None,
        [],
        {"kind": "laplace", "noise_multiplier": 1.0},
        {"kind": ["gaussian"], "noise_multiplier": 1.0},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": 1.0, "extra": 1},
        {"kind": "gaussian", "noise_multiplier": "1.0"},
        {"kind": "poisson_sampled", "event": 1.0, "sampling_prob": 0.1},
        {"kind": "sequence", "events": {"kind": "gaussian"}},
        {"kind": "sequence", "events": [{"kind": "gaussian", "noise_multiplier": -1}]},
        {"kind": "repeat", "event": {"kind": "gaussian", "noise_multiplier": 1}, "count": 0},
    ],
)
def test_strict_parsing(bad: Any) -> None:
    with pytest.raises(ValueError):
        event_from_dict(bad)


def test_bottomless_nesting_is_refused() -> None:
    d: dict[str, Any] = Gaussian(1.0).to_dict()
    for _ in range(10_000):
        d = {"kind": "repeat", "event": d, "count": 1}
    with pytest.raises(ValueError, match="nested"):
        event_from_dict(d)


def test_joint_gaussian() -> None:
    assert Gaussian.joint(3.0) == Gaussian(3.0)
    assert Gaussian.joint(2.0, 2.0, 2.0, 2.0).noise_multiplier == pytest.approx(1.0, rel=1e-15)
    assert Gaussian.joint(3.0, 4.0).noise_multiplier == pytest.approx(2.4, rel=1e-15)
    assert Gaussian.joint(1.0, 0.0) == Gaussian(0.0)
    assert Gaussian.joint(1e-200, 1e-200).noise_multiplier == pytest.approx(1e-200 / math.sqrt(2), rel=1e-15)
    assert Gaussian.joint(1e200, 1e200).noise_multiplier == pytest.approx(1e200 / math.sqrt(2), rel=1e-15)
    for bad in ((), (1.0, -1.0), (math.nan,)):
        with pytest.raises(ValueError):
            Gaussian.joint(*bad)
