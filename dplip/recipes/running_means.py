# SPDX-License-Identifier: Apache-2.0
"""Running means of mean-shift layers, estimated anew for the network that is deployed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dplip.errors import ConfigError, DataError
from dplip.layers import DistanceLayer, MeanShift
from dplip.recipes.p_schedule import at_p

__all__ = ["reestimate_means"]


@torch.no_grad()
def reestimate_means(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace every running mean of ``model`` by the average of the batch means of ``batches``, at ``p = inf``.

    Momentum is ``n_t / (n_1 + ... + n_t)`` for a batch of ``n_t`` examples, ``1 / t`` where they are equal, so the
    result is the mean over all examples and does not depend on what was there before. Everything but the mean shifts is
    in evaluation
    mode: sort neurons are exact, nothing is dropped. Modes, momenta and exponents are restored.

    The means depend on the data without noise: not for private runs.

    Raises:
        ConfigError: ``model`` has no :class:`MeanShift`.
        DataError: ``batches`` is empty.
    """
    shifts = [m for m in model.modules() if isinstance(m, MeanShift)]
    if not shifts:
        raise ConfigError(
            f"reestimate_means: expected a model with MeanShift layers, got {type(model).__name__}; skip it"
        )
    modes = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in shifts]
    annealed = any(isinstance(m, DistanceLayer) and hasattr(m, "p") for m in model.modules())
    seen = 0
    try:
        model.eval()
        for shift in shifts:
            shift.train()
        with at_p(model, math.inf) if annealed else contextlib.nullcontext():
            for x in batches:
                if len(x) == 0:
                    continue
                seen += len(x)
                for shift in shifts:
                    shift.momentum = len(x) / seen
                model(x)
    finally:
        for module, training in modes:
            module.training = training
        for shift, momentum in zip(shifts, momenta, strict=True):
            shift.momentum = momentum
    if seen == 0:
        raise DataError("reestimate_means: expected one or more examples, got none; pass the training inputs")
