# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling of batches, with empty batches and all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from dplip.errors import DataError, PlanError
from dplip.privacy.noise import host_stream
from dplip.privacy.plan import PrivacyPlan

__all__ = ["PoissonSampler", "PrivateLoader"]


class PoissonSampler:
    """Yields index tensors: each of ``size`` examples enters each batch with probability ``q``, independently.

    Under truncated sampling a batch above ``max_batch_size`` loses a uniformly random excess (the mechanism analysed
    in Ganesh, arXiv 2508.15089). The generator is seeded by the operating system unless ``insecure_seed`` is given.
    The stream does not end: how many steps are taken is the optimizer's business.

    Raises:
        DataError: there are no examples.
        PlanError: truncated sampling of more than ``population`` examples, for which it is not proved.
    """

    def __init__(self, plan: PrivacyPlan, size: int, insecure_seed: int | None = None) -> None:
        if size < 1:
            raise DataError("sampler: expected a non-empty dataset, got 0 examples; check the data before training")
        if plan.max_batch_size is not None and size > plan.population:
            raise PlanError(
                f"sampler: expected at most population={plan.population} examples under truncated sampling, got more; "
                "raise population, the public upper limit its proof rests on"
            )
        self.plan, self.size, self.insecure_seed = plan, size, insecure_seed
        self.continue_from(0)

    def continue_from(self, steps: int) -> None:
        """Start a stream that no earlier step has used; a run resumes with it."""
        self._stream = host_stream(self.insecure_seed, "sampling", steps)

    def draw(self) -> Tensor:
        """The next batch's indices, int64 [b] in increasing order; ``b`` may be 0."""
        # 53-bit uniforms: a float32 one has 2^-24 steps, which would move q by up to that much
        index = (self._stream.random(self.size) < self.plan.sampling_prob).nonzero()[0]
        limit = self.plan.max_batch_size
        if limit is not None and len(index) > limit:
            index = np.sort(self._stream.choice(index, limit, replace=False))
        return torch.from_numpy(index.astype(np.int64))


class PrivateLoader:
    """Iterates one epoch of Poisson batches over a map-style dataset; what ``make_private`` returns as the loader.

    Yields what ``collate`` makes of the drawn examples (a plain ``TensorDataset`` under the default collate function is
    indexed directly). An empty draw yields the same structure with a batch axis of 0, so its noise is still released
    and its step still counted.

    Raises:
        PlanError: the dataset has no indices or no length.
        DataError: an empty batch cannot be formed from what ``collate`` returns.
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
        # A subclass may transform in __getitem__, which indexing its tensors would skip.
        self._indexed = type(dataset) is TensorDataset and self._collate is default_collate
        self.batch(torch.empty(0, dtype=torch.int64))  # refuse now what would fail at the first empty draw

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
        if self._indexed:
            return [t[index] for t in self.dataset.tensors]
        if len(index) == 0:
            return _emptied(self._collate([self.dataset[0]]))
        return self._collate([self.dataset[int(i)] for i in index])


def _emptied(batch: Any) -> Any:
    """The same structure with every tensor cut to a batch axis of 0."""
    if isinstance(batch, Tensor) and batch.ndim > 0:
        return batch[:0]
    if isinstance(batch, dict):
        return {key: _emptied(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        if batch and all(isinstance(value, (str, bytes)) for value in batch):  # one string per example
            return type(batch)()
        parts = [_emptied(value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    raise DataError(
        "loader: expected batches of tensors with a batch axis, got "
        f"{type(batch).__name__}; make collate return tensors [B, *]"
    )
