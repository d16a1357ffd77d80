# SPDX-License-Identifier: Apache-2.0
"""Shards partition the data, their masks are independent, and their union is the Poisson batch of one process."""

import numpy as np
import pytest
import torch

from dplip.errors import DataError, PlanError
from dplip.privacy import PoissonSampler
from dplip.privacy.distributed_sampling import ShardedPoissonSampler
from tests.privacy.toy import plan

N, WORLD, DRAWS = 30, 4, 4000


def samplers(world: int = WORLD, size: int = N, seed: int | None = 3, q: float = 0.3) -> list[ShardedPoissonSampler]:
    return [ShardedPoissonSampler(plan(sampling_prob=q), size, rank, world, seed) for rank in range(world)]


def masks(ranks: list[ShardedPoissonSampler], draws: int = DRAWS) -> np.ndarray:
    """0/1 of shape [draws, N]."""
    found = np.zeros((draws, N))
    for row in found:
        for sampler in ranks:
            row[sampler.draw().numpy()] += 1
    return found


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_every_example_has_one_owner(world: int) -> None:
    ranks = samplers(world, q=1.0)
    drawn = [sampler.draw() for sampler in ranks]
    assert sorted(torch.cat(drawn).tolist()) == list(range(N))
    assert max(map(len, drawn)) - min(map(len, drawn)) <= 1
    assert all(index.dtype == torch.int64 and (index.diff() > 0).all() for index in drawn)


@pytest.mark.parametrize("seed", [3, None])
def test_the_union_is_independent_coins_of_one_bias(seed: int | None) -> None:
    found = masks(samplers(seed=seed))
    assert set(np.unique(found)) == {0.0, 1.0}
    q = found.mean(0)
    assert np.abs(q - 0.3).max() < 5 * (0.3 * 0.7 / DRAWS) ** 0.5
    correlation = np.corrcoef(found.T) - np.eye(N)  # one seed for all ranks would give 1 between neighbours
    assert np.abs(correlation).max() < 5 / DRAWS**0.5
    sizes = found.sum(1)
    assert sizes.var() == pytest.approx(N * 0.3 * 0.7, rel=0.15)  # binomial: the coins share nothing


def test_one_seed_gives_every_rank_its_own_mask_and_each_resume_a_new_one() -> None:
    first = [s.draw() // WORLD for s in samplers(size=400)]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    again, resumed = samplers(size=400), samplers(size=400)
    for sampler in resumed:
        sampler.continue_from(1)
    assert all(torch.equal(a, s.draw() // WORLD) for a, s in zip(first, again, strict=True))
    assert all(not torch.equal(a, s.draw() // WORLD) for a, s in zip(first, resumed, strict=True))


def test_one_rank_is_the_plain_sampler() -> None:
    (alone,) = samplers(1)
    plain = PoissonSampler(plan(sampling_prob=0.3), N, 3)
    assert all(torch.equal(alone.draw(), plain.draw()) for _ in range(5))


def test_a_rank_without_examples_draws_empty_batches() -> None:
    ranks = samplers(WORLD, size=2, q=1.0)
    assert [s.draw().tolist() for s in ranks] == [[0], [1], [], []]


def test_what_cannot_be_sharded_exactly_is_refused() -> None:
    truncated = plan(sampling="truncated_poisson", max_batch_size=40)
    with pytest.raises(PlanError, match="the union that no rank sees"):
        ShardedPoissonSampler(truncated, N, 0, 2)
    assert len(ShardedPoissonSampler(truncated, N, 0, 1).draw()) <= 40
    with pytest.raises(DataError):
        ShardedPoissonSampler(plan(), 0, 0, 2)
