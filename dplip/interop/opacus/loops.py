# SPDX-License-Identifier: Apache-2.0
"""Opacus' loops around our clip-free engine: its ``BatchMemoryManager`` and its noise schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dplip.errors import PlanError
from dplip.privacy import PrivateLoader

__all__ = ["data_loader", "noise_schedule"]


def data_loader(loader: PrivateLoader) -> DataLoader[Any]:
    """The loader that ``ClipFreeEngine.make_private`` returned, as a torch ``DataLoader`` over its Poisson draws.

    ``BatchMemoryManager(data_loader=data_loader(loader), max_physical_batch_size=64, optimizer=optimizer)`` then splits
    draws into disjoint parts and tells the optimizer which part is the last; empty draws stay. Our own
    :class:`dplip.privacy.virtual_batches` does the same and also drops what a broken loop leaves behind. One process
    loads the data: workers would fetch ahead of the steps.
    """
    places: Any = range(loader.sampler.size)
    return DataLoader(places, batch_sampler=_Draws(loader), collate_fn=partial(_batch, loader))


class _Draws(Sampler[list[int]]):
    def __init__(self, loader: PrivateLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self.loader)):
            yield self.loader.sampler.draw().tolist()


def _batch(loader: PrivateLoader, index: list[int]) -> Any:
    return loader.batch(torch.tensor(index, dtype=torch.int64))


def noise_schedule(make: Callable[[Any], Any], *, every: int) -> Callable[[int], float]:
    """An Opacus noise scheduler as the ``noise_schedule`` of a plan: a factor for each 0-based step.

    The plan fixes the noise of every step before the first, so that calibration, epsilon and checkpoints cover the
    whole schedule; the same scheduler may then drive the private optimizer, and is checked against the plan::

        halving = lambda optimizer: ExponentialNoise(optimizer, gamma=0.5)
        schedule = noise_schedule(halving, every=len(loader))
        model, optimizer, loader = engine.make_private_with_epsilon(..., noise_schedule=schedule)
        scheduler = halving(optimizer)  # optional: scheduler.step() after each epoch

    Args:
        make: builds the scheduler on the optimizer it is given.
        every: steps between two calls of ``scheduler.step()``, usually those of an epoch.

    Raises:
        PlanError: ``every`` is below 1, or the schedule is not a factor on the initial noise multiplier.
    """
    if type(every) is not int or every < 1:
        raise PlanError(f"noise_schedule: expected every to be an integer >= 1, got {every!r}; fix it")
    runs = [(base, SimpleNamespace(noise_multiplier=base)) for base in (1.0, 3.0)]
    schedulers = [make(optimizer) for _, optimizer in runs]
    factors: list[float] = []

    def factor(step: int) -> float:
        while len(factors) <= step // every:
            for scheduler in schedulers if factors else ():
                scheduler.step()
            one, other = (float(optimizer.noise_multiplier) / base for base, optimizer in runs)
            if not math.isclose(one, other, rel_tol=1e-9):
                raise PlanError(
                    f"noise_schedule: expected a factor on the initial noise multiplier, got {one:g} and {other:g} "
                    f"for two of them at step {len(factors) * every}; write it as a function of the step"
                )
            factors.append(one)
        return factors[step // every]

    return factor
