# SPDX-License-Identifier: Apache-2.0
"""The same on a GPU: nccl with one rank, and two gloo ranks that share the device."""

from __future__ import annotations

import pytest

from tests.privacy.ranks import values
from tests.privacy.test_distributed import (
    LAYOUTS,
    RUNS,
    STEPS,
    alone,
    assert_close,
    measure_noise,
    train_ranks,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nccl_is_one_process(layout: str) -> None:
    (records,) = values(train_ranks, layout, "cuda", world=1, backend="nccl")
    for name in RUNS:
        one = alone([records[name]], name, "cuda")
        assert records[name]["state"] == one["state"] and one["state"]["steps_taken"] == STEPS
        assert records[name]["sigma"][0] == one["sigma"][0]
        assert_close(records[name]["weights"], one["weights"])  # one rank draws the one-process noise in every layout


def test_two_gloo_ranks_on_one_device_are_one_process() -> None:
    first, second = values(train_ranks, "plain", "cuda")
    for name in RUNS:
        one = alone([first[name], second[name]], name, "cuda")
        assert first[name]["state"] == second[name]["state"] == one["state"]
        assert_close(first[name]["weights"], second[name]["weights"])
        assert_close(first[name]["weights"], one["weights"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_on_the_device_has_the_variance_of_the_plan(layout: str) -> None:
    ((big, *_, lag, halves),) = values(measure_noise, layout, None, "cuda", world=1, backend="nccl")
    assert big == pytest.approx(1, abs=0.02) and abs(lag) < 0.02 and abs(halves) < 0.02
