# SPDX-License-Identifier: Apache-2.0
"""A small private training problem for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import TensorDataset

from dplip.bounds import InputDomain
from dplip.layers import LinfDistance, Scale
from dplip.losses import BoundedLoss, CrossEntropy
from dplip.privacy import ClipFreeEngine, ClipFreeOptimizer, PrivacyPlan

DIM, CLASSES = 5, 3
DOMAIN = InputDomain((DIM,), 0.0, 1.0)


def plan(**changes: Any) -> PrivacyPlan:
    """A valid plan with ``changes``."""
    values: dict[str, Any] = {
        "population": 100,
        "sampling_prob": 0.2,
        "steps": 10,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
    }
    return PrivacyPlan(**(values | changes))


def net() -> nn.Sequential:
    """Two l_inf-distance layers, the second turned into logits."""
    return nn.Sequential(LinfDistance(DIM, 4), LinfDistance(4, CLASSES), Scale(-1.0))


def data(n: int = 60) -> TensorDataset:
    x = torch.rand(n, DIM)
    return TensorDataset(x, (x[:, 0] * CLASSES).long())


def attach(
    module: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    loss: BoundedLoss | None = None,
    seed: int | None = 7,
    domain: InputDomain | None = DOMAIN,
    **changes: Any,
) -> tuple[ClipFreeEngine, ClipFreeOptimizer]:
    """Make ``module`` private under :func:`plan` with ``changes``."""
    settings = plan(**changes)
    engine = ClipFreeEngine(accountant=settings.accountant, neighbors=settings.neighbors, insecure_seed=seed)
    optimizer = SGD(module.parameters(), 0.1) if optimizer is None else optimizer
    engine.attach(module, optimizer, data(), loss or CrossEntropy(), settings, domain)
    assert engine.optimizer is not None
    return engine, engine.optimizer


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
