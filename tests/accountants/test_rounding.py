# SPDX-License-Identifier: Apache-2.0
"""Merging the steps of a schedule: always to the side of more loss, and by little."""

from __future__ import annotations

import random

import pytest

from accountants import Event, Gaussian, PldAccountant, PoissonSampled, RdpAccountant
from accountants.mechanisms import noise_multiplier
from accountants.rounding import merge_similar


def schedule(n: int, q: float = 0.01) -> dict[Event, int]:
    return {PoissonSampled(Gaussian(2.0 - i / n), q): 1 for i in range(n)}


def test_few_steps_are_left_alone() -> None:
    mechanisms = schedule(80)
    assert merge_similar(mechanisms, 80) is mechanisms


def test_every_step_loses_noise_or_keeps_it_but_little() -> None:
    rng = random.Random(0)
    for n in (81, 300, 5000):
        mechanisms = {PoissonSampled(Gaussian(rng.uniform(1.0, 2.0)), 0.01): 1 for _ in range(n)}
        merged = merge_similar(mechanisms, 80)
        assert len(merged) <= 80
        assert sum(merged.values()) == n
        before = sorted(noise_multiplier(m) for m in mechanisms)
        after = sorted(noise_multiplier(m) for m, c in merged.items() for _ in range(c))
        ratios = [b / a for a, b in zip(after, before, strict=True)]
        assert min(ratios) >= 1.0
        assert max(ratios) <= 2 ** (1 / 64) * (1 + 1e-12)


def test_grid_points_stay_where_they_are() -> None:
    mechanisms: dict[Event, int] = {PoissonSampled(Gaussian(2.0**k), 0.5): 1 for k in range(-30, 60)}
    mechanisms |= {PoissonSampled(Gaussian(2.0**k * (1 + 2**-52)), 0.5): 1 for k in range(-30, 60)}
    merged = merge_similar(mechanisms, 100)
    assert merged == {PoissonSampled(Gaussian(2.0**k), 0.5): 2 for k in range(-30, 60)}


def test_probabilities_are_rounded_up_and_only_when_there_are_many() -> None:
    mechanisms: dict[Event, int] = {PoissonSampled(Gaussian(1.0 + i / 100), 0.01 + i / 10_000): 1 for i in range(100)}
    before = sorted((m.sampling_prob, noise_multiplier(m)) for m in mechanisms if isinstance(m, PoissonSampled))
    merged = merge_similar(mechanisms, 80)
    after = sorted(
        (m.sampling_prob, noise_multiplier(m))
        for m, c in merged.items()
        if isinstance(m, PoissonSampled)
        for _ in range(c)
    )
    assert all(q1 >= q0 and z1 <= z0 for (q0, z0), (q1, z1) in zip(before, after, strict=True))
    kept = {m.sampling_prob for m in merge_similar(schedule(300), 80) if isinstance(m, PoissonSampled)}
    assert kept == {0.01}


@pytest.mark.parametrize(("kind", "multipliers"), [(PldAccountant, 60), (RdpAccountant, 21)])
def test_a_merged_schedule_is_above_the_exact_one_and_close(
    kind: type[PldAccountant] | type[RdpAccountant], multipliers: int
) -> None:
    # A few multipliers are kept as they are; splitting each in four by tiny amounts forces merging, while the
    # truth moves by less than a millionth.
    exact, split = kind(), kind()
    for i in range(multipliers):
        z = 2.0 - i / multipliers
        exact.compose(PoissonSampled(Gaussian(z), 0.05), 4)
        for j in range(4):
            split.compose(PoissonSampled(Gaussian(z * (1 + j * 1e-8)), 0.05))
    low, high = exact.epsilon(1e-5), split.epsilon(1e-5)
    assert low * (1 - 1e-6) <= high <= low * 1.015


def test_a_thousand_different_steps() -> None:
    accountant = PldAccountant()
    for i in range(1000):
        accountant.compose(PoissonSampled(Gaussian(2.0 - i / 1000), 0.01))
    # dp-accounting without merging gives 1.0803 at a spacing of 1e-3, at most 0.0008 above the truth.
    assert 1.0795 <= accountant.epsilon(1e-5) <= 1.0803 * 1.01
