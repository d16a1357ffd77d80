# SPDX-License-Identifier: Apache-2.0
"""Batches are Poisson draws at the plan's probability, empty ones included."""

from collections import OrderedDict
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from dplip.errors import DataError, PlanError
from dplip.privacy import PoissonSampler, PrivateLoader
from tests.privacy.toy import plan


def members(sampler: PoissonSampler, draws: int) -> np.ndarray:
    """Which example entered which draw: bool [draws, size]."""
    held = np.zeros((draws, sampler.size), dtype=bool)
    for row in held:
        row[sampler.draw().numpy()] = True
    return held


@pytest.mark.parametrize("q", [0.02, 0.3, 0.9])
def test_every_example_enters_with_probability_q(q: float) -> None:
    held = members(PoissonSampler(plan(sampling_prob=q), 50, insecure_seed=1), 4000)
    counts = held.sum(0)
    statistic = float(((counts - 4000 * q) ** 2 / (4000 * q * (1 - q))).sum())
    assert 1e-4 < stats.chi2(50).sf(statistic) < 1 - 1e-4


def test_examples_enter_independently() -> None:
    q, draws = 0.3, 6000
    held = members(PoissonSampler(plan(sampling_prob=q), 20, insecure_seed=2), draws).astype(float)
    normed = (held - q) / np.sqrt(q * (1 - q))
    within = normed.T @ normed / np.sqrt(draws)
    pairs = within[np.triu_indices(20, 1)]
    assert 1e-4 < stats.chi2(len(pairs)).sf(float((pairs**2).sum())) < 1 - 1e-4
    across = (normed[:-1].T @ normed[1:] / np.sqrt(draws - 1)).ravel()
    assert 1e-4 < stats.chi2(len(across)).sf(float((across**2).sum())) < 1 - 1e-4


def test_batch_size_is_binomial() -> None:
    q, size = 0.1, 30
    sizes = members(PoissonSampler(plan(sampling_prob=q), size, insecure_seed=3), 8000).sum(1)
    law = stats.binom(size, q)
    edges = [*range(8), size + 1]
    found = np.array([((a <= sizes) & (sizes < b)).sum() for a, b in pairwise(edges)])
    expected = 8000 * np.diff([law.cdf(e - 1) for e in edges])
    assert found[0] > 0, "empty batches occur"
    assert stats.chisquare(found, expected, sum_check=False).pvalue > 1e-4


def test_indices_are_sorted_and_distinct() -> None:
    for changes in ({}, {"sampling": "truncated_poisson", "max_batch_size": 12}):
        sampler = PoissonSampler(plan(**changes), 80, insecure_seed=4)
        for _ in range(50):
            index = sampler.draw()
            assert index.dtype == torch.int64 and bool((index.diff() > 0).all())
            assert index.numel() == 0 or (0 <= int(index.min()) and int(index.max()) < 80)


def test_probability_one_takes_everything() -> None:
    sampler = PoissonSampler(plan(sampling_prob=1.0), 33)
    assert torch.equal(sampler.draw(), torch.arange(33))


def test_truncated_batches_are_uniform_and_never_above_the_limit() -> None:
    q, limit, size, draws = 0.3, 5, 20, 6000
    settings = plan(sampling_prob=q, sampling="truncated_poisson", max_batch_size=limit)
    held = members(PoissonSampler(settings, size, insecure_seed=5), draws)
    sizes = held.sum(1)
    law = stats.binom(size, q)
    assert sizes.max() == limit
    assert (sizes == limit).mean() == pytest.approx(law.sf(limit - 1), abs=0.03)
    # Which examples survive the cut is uniform: no index is favoured.
    cut = held[sizes == limit].sum(0)
    assert stats.chisquare(cut).pvalue > 1e-4
    assert ((sizes[sizes < limit] == 4).mean()) == pytest.approx(law.pmf(4) / law.cdf(4), abs=0.05)


def test_truncated_sampling_refuses_more_examples_than_its_proof_covers() -> None:
    settings = plan(population=50, sampling="truncated_poisson", max_batch_size=20)
    PoissonSampler(settings, 50)
    with pytest.raises(PlanError, match="population=50"):
        PoissonSampler(settings, 51)


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_probability_comes_from_the_plan_not_from_the_data(size: int) -> None:
    dataset = TensorDataset(torch.zeros(size, 2))
    loader = PrivateLoader(dataset, PoissonSampler(plan(population=100), size, insecure_seed=6))
    assert len(loader) == 5 == len(list(loader)) and loader.plan.expected_batch_size == 20
    sizes = [len(loader.sampler.draw()) for _ in range(800)]
    assert np.mean(sizes) == pytest.approx(0.2 * size, abs=5 * np.sqrt(size * 0.16 / 800))


def test_streams_are_fresh_unless_fixed() -> None:
    def first(seed: int | None, resumed: int | None = None) -> list[int]:
        sampler = PoissonSampler(plan(), 200, seed)
        if resumed is not None:
            sampler.continue_from(resumed)
        return sampler.draw().tolist()

    assert first(None) != first(None) and first(None, 3) != first(None, 3)
    assert first(1) == first(1) != first(2)
    assert first(1, 5) == first(1, 5) != first(1)
    state = torch.get_rng_state()
    first(None)
    assert torch.equal(state, torch.get_rng_state())


class Point(NamedTuple):
    x: Tensor
    y: int


class Items(Dataset[Any]):
    """Examples made by a function of the index."""

    def __init__(self, make: Any, size: int = 6) -> None:
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


MAKERS: dict[str, Any] = {
    "tuple": lambda i: (torch.full((2, 3), float(i)), i),
    "dict": lambda i: {"x": torch.full((4,), float(i)), "y": i},
    "namedtuple": lambda i: Point(torch.full((4,), float(i)), i),
    "nested": lambda i: (OrderedDict(a=torch.zeros(2), b=(torch.ones(3), float(i))), np.float32(i)),
    "named": lambda i: (torch.zeros(2), f"row {i}"),
}


def leaves(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [leaf for value in batch.values() for leaf in leaves(value)]
    if isinstance(batch, (list, tuple)):
        return [leaf for value in batch for leaf in leaves(value)]
    return [batch]


@pytest.mark.parametrize("kind", MAKERS)
def test_empty_batch_has_the_structure_of_a_full_one(kind: str) -> None:
    loader = PrivateLoader(Items(MAKERS[kind]), PoissonSampler(plan(), 6))
    full, empty = loader.batch(torch.arange(2)), loader.batch(torch.tensor([], dtype=torch.int64))
    assert type(full) is type(empty)
    tensors = [(a, b) for a, b in zip(leaves(full), leaves(empty), strict=False) if isinstance(a, Tensor)]
    assert len(tensors) >= 1
    for a, b in tensors:
        assert b.shape == (0, *a.shape[1:]) and a.dtype == b.dtype and len(a) == 2
    if isinstance(full, dict):
        assert full.keys() == empty.keys()
    if kind == "named":
        assert list(full[1]) == ["row 0", "row 1"] and list(empty[1]) == []


def test_tensor_dataset_batches() -> None:
    x, y = torch.rand(6, 2, 2), torch.arange(6)
    loader = PrivateLoader(TensorDataset(x, y), PoissonSampler(plan(), 6))
    a, b = loader.batch(torch.tensor([1, 4]))
    assert torch.equal(a, x[[1, 4]]) and torch.equal(b, y[[1, 4]])
    a, b = loader.batch(torch.tensor([], dtype=torch.int64))
    assert a.shape == (0, 2, 2) and b.shape == (0,) and a.dtype == x.dtype and b.dtype == y.dtype


class Doubled(TensorDataset):
    """A dataset that transforms its examples."""

    def __getitem__(self, index: Any) -> Any:
        return tuple(2 * t for t in super().__getitem__(index))


def test_transforms_and_collate_functions_are_applied() -> None:
    x = torch.rand(6, 3)
    pair = torch.tensor([0, 5])
    doubled = PrivateLoader(Doubled(x), PoissonSampler(plan(), 6))
    assert torch.equal(doubled.batch(pair)[0], 2 * x[pair])
    own = PrivateLoader(TensorDataset(x), PoissonSampler(plan(), 6), lambda items: torch.stack([-i[0] for i in items]))
    assert torch.equal(own.batch(pair), -x[pair])
    assert own.batch(torch.tensor([], dtype=torch.int64)).shape == (0, 3)


def test_iteration_yields_empty_batches() -> None:
    settings = plan(sampling_prob=0.01, steps=200)
    loader = PrivateLoader(TensorDataset(torch.rand(10, 3)), PoissonSampler(settings, 10, insecure_seed=8))
    sizes = [len(x) for (x,) in loader]
    assert len(sizes) == 100 and sizes.count(0) > 70 and max(sizes) >= 1


def test_what_cannot_be_sampled_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([1, 2])

    with pytest.raises(DataError, match="non-empty"):
        PoissonSampler(plan(), 0)
    for dataset in (Stream(), iter([1]), 5):
        with pytest.raises(PlanError, match="map-style"):
            PrivateLoader(dataset, PoissonSampler(plan(), 2))


def test_batch_that_cannot_be_emptied_is_refused_at_once() -> None:
    for collate in (lambda items: 3.0, lambda items: (torch.tensor(1.0),), lambda items: {"x": object()}):
        with pytest.raises(DataError, match="collate"):
            PrivateLoader(Items(MAKERS["tuple"]), PoissonSampler(plan(), 6), collate)
