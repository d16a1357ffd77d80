# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling of batches, with empty batches and all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from dplip.errors import DataError, PlanError
from dplip.privacy.noise import derived_seed, fresh_seed
from dplip.privacy.plan import PrivacyPlan

__all__ = ["PoissonSampler", "PrivateLoader"]


class PoissonSampler:
    """Yields index tensors: each of ``size`` examples enters each batch with probability ``q``, independently.

    Under truncated sampling a batch above ``max_batch_size`` loses a uniformly random excess (the mechanism analysed
    in Ganesh, arXiv 2508.15089). The generator is seeded by the operating system unless ``insecure_seed`` is given.
    The stream does not end: how many steps are taken is the optimizer's business.
    """

    def __init__(self, plan: PrivacyPlan, size: int, insecure_seed: int | None = None) -> None:
        if size < 1:
            raise DataError("sampler: expected a non-empty dataset, got 0 examples; check the data before training")
        self.plan, self.size, self.insecure_seed = plan, size, insecure_seed
        self._generator = torch.Generator()
        self._generator.manual_seed(fresh_seed() if insecure_seed is None else insecure_seed)

    def continue_from(self, steps: int) -> None:
        """Start a stream that no earlier step has used; a run resumes with it."""
        seed = fresh_seed() if self.insecure_seed is None else derived_seed(self.insecure_seed, steps)
        self._generator.manual_seed(seed)

    def draw(self) -> Tensor:
        """The next batch's indices, int64 [b] in increasing order; ``b`` may be 0."""
        # float64: a float32 uniform has 2^-24 steps, which would move q by up to that much
        uniform = torch.rand(self.size, generator=self._generator, dtype=torch.float64)
        index = (uniform < self.plan.sampling_prob).nonzero().squeeze(1)
        limit = self.plan.max_batch_size
        if limit is not None and len(index) > limit:
            index = index[torch.randperm(len(index), generator=self._generator)[:limit]].sort()[0]
        return index


class PrivateLoader:
    """Iterates one epoch of Poisson batches over a map-style dataset; what ``make_private`` returns as the loader.

    Yields what ``collate`` makes of the drawn examples (tensors are indexed directly for a ``TensorDataset``). An empty
    draw yields the same structure with a batch axis of 0, so its noise is still released and its step still counted.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: PoissonSampler,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise PlanError(
                f"loader: expected a map-style dataset, got {type(dataset).__name__}; Poisson sampling needs indices"
            )
        self.dataset, self.sampler = dataset, sampler
        self._collate = collate or default_collate

    @property
    def plan(self) -> PrivacyPlan:
        """The plan the batches are drawn under."""
        return self.sampler.plan

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            yield self.batch(self.sampler.draw())

    def batch(self, index: Tensor) -> Any:
        """The examples at ``index``."""
        if isinstance(self.dataset, TensorDataset):
            return [t[index] for t in self.dataset.tensors]
        if len(index) == 0:
            return _emptied(self._collate([self.dataset[0]]))
        return self._collate([self.dataset[int(i)] for i in index])


def _emptied(batch: Any) -> Any:
    """The same structure with every tensor cut to a batch axis of 0."""
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, dict):
        return {key: _emptied(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [_emptied(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    raise DataError(f"loader: expected batches of tensors, got {type(batch).__name__}; make collate return tensors")
