# SPDX-License-Identifier: Apache-2.0
"""What ``make_private`` makes of its arguments: plan settings, default domain, wrapped foreign modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from accountants import Neighbors
from dplip.bounds import InputDomain
from dplip.errors import DataError, PlanError
from dplip.privacy.foreign import clip_foreign, unclip_foreign

__all__ = ["PublicSizeWarning", "clipping", "dataset_size", "default_domain", "listed", "plan_settings"]


class PublicSizeWarning(UserWarning):
    """The dataset's size is being used as if it were public."""


def plan_settings(
    loader: DataLoader[Any],
    epochs: int | None,
    steps: int | None,
    delta: float,
    population: int | None,
    neighbors: Neighbors,
    accountant: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What a :class:`PrivacyPlan` takes, from the arguments of ``make_private``; the caller's caller is warned."""
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        raise PlanError(
            "engine: expected a torch DataLoader with a batch_size, got another; build one with batch_size="
        )
    size = dataset_size(loader.dataset)
    if population is None:
        population = size
        warnings.warn(
            f"the number of examples, {size}, sets the sampling probability and so becomes public; "
            "pass population= with a public constant",
            PublicSizeWarning,
            stacklevel=3,
        )
    if not isinstance(population, int) or population < 1:
        raise PlanError(f"plan.population: expected an integer >= 1, got {population!r}; fix the configuration")
    q = min(1.0, loader.batch_size / population)
    if (epochs is None) == (steps is None):
        raise PlanError(f"engine: expected either epochs or steps, got {epochs} and {steps}; give one of them")
    count = steps if steps is not None else epochs * max(1, round(1 / q))  # type: ignore[operator]
    return {
        "population": population,
        "sampling_prob": q,
        "steps": count,
        "delta": delta,
        "neighbors": neighbors.value,
        "accountant": accountant,
        **options,
    }


@contextmanager
def clipping(module: nn.Module, foreign: Mapping[str, float]) -> Iterator[None]:
    """Wrap foreign submodules; a refusal inside the block leaves the module as it came."""
    inner = module.module if isinstance(module, DistributedDataParallel) else getattr(module, "_orig_mod", module)
    if foreign:
        clip_foreign(inner, foreign)
    try:
        yield
    except Exception:
        if foreign:
            unclip_foreign(inner, foreign)
        raise


def listed(schedulers: Any) -> list[Any]:
    """One scheduler, several or none, as a list."""
    if schedulers is None:
        return []
    return list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers]


def dataset_size(dataset: Any) -> int:
    """Number of examples; raises :class:`PlanError` where there are no indices and :class:`DataError` at 0."""
    if not isinstance(dataset, Sized):
        raise PlanError(
            f"engine: expected a map-style dataset with a length, got {type(dataset).__name__}; "
            "Poisson sampling needs indices"
        )
    size = len(dataset)
    if size == 0:
        raise DataError("engine: expected a non-empty dataset, got 0 examples; check the data before training")
    return size


def default_domain(dataset: Any) -> InputDomain:
    """Any finite input of the first example's shape."""
    try:
        return InputDomain(tuple(torch.as_tensor(dataset[0][0]).shape))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"engine: expected examples (x, ...) with a tensor x, got {type(dataset[0]).__name__}; pass domain="
        ) from error
