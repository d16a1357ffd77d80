# SPDX-License-Identifier: Apache-2.0
"""One clip-free anomaly detector for every table: private standardisation, frozen cosines, one private layer.

All of it is inside one budget: the two statistics releases and every step are in the same ledger, which is asked for
epsilon at the end. One run per table is made on its training part; no result of another run on it is looked at.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass

import torch
from adbench import Table, auroc
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from accountants import Gaussian, PoissonSampled, Repeat, Sequence, calibrate_noise_multiplier
from dplip.bounds import InputDomain
from dplip.layers import Clamp, NormalizedLinear, RandomFeatures, Shift
from dplip.losses import BinaryCrossEntropy
from dplip.privacy import ClipFreeEngine, NoiseSource, PrivacyPlan, PrivateStandardizer

__all__ = ["Outcome", "Settings", "detect"]


@dataclass(frozen=True)
class Settings:
    """Fixed for all tables; the batch and the learning rate follow the public number of training rows by formula.

    Attributes:
        epsilon: the whole budget.
        statistics: share of the squared inverse noise multiplier that pays for standardisation.
        steps: noisy steps.
        batch: largest expected batch; smaller tables use all rows in every step.
        features: number of cosines.
        low, high, linear: see :class:`dplip.layers.RandomFeatures`.
        rate: learning rate at 160,000 rows; it scales with the square root of the rows and with the fourth root of
            ``1 / (p (1 - p))`` for the released share ``p`` of anomalies.
        momentum, average: of the gradient, and of the iterates.
    """

    epsilon: float = 1.0
    statistics: float = 0.1
    steps: int = 100
    batch: int = 32768
    features: int = 256
    low: float = 0.7
    high: float = 2.0
    linear: float = 0.7
    rate: float = 200.0
    momentum: float = 0.9
    average: float = 0.9


@dataclass(frozen=True)
class Outcome:
    """Test AUROC (percent) and the epsilon that the ledger proves at the table's delta."""

    auroc: float
    epsilon: float


@functools.cache
def _multipliers(settings: Settings, q: float, delta: float) -> tuple[float, float]:
    """Noise multipliers of each statistics release and of each step."""
    whole = calibrate_noise_multiplier(Gaussian, epsilon=settings.epsilon, delta=delta)
    statistics = whole * math.sqrt(2 / settings.statistics)
    event = PrivateStandardizer.event_for(statistics)

    def run(z: float) -> Sequence:
        return Sequence((event, Repeat(PoissonSampled(Gaussian(z), q), settings.steps)))

    return statistics, calibrate_noise_multiplier(run, epsilon=settings.epsilon, delta=delta)


def detect(table: Table, settings: Settings, seed: int) -> Outcome:
    """Train on the table's training part under ``settings.epsilon`` and score its test part.

    ``seed`` fixes noise and sampling, so that the experiment can be repeated; a release would leave it out.
    """
    rows, dim = len(table.train.y), table.train.x.shape[1]
    q = min(1.0, settings.batch / rows)
    at_statistics, at_steps = _multipliers(settings, q, table.delta)
    scaling = PrivateStandardizer.release(
        table.train.x, table.train.y.float(), at_statistics, NoiseSource(insecure_seed=2 * seed + 1)
    )
    rate = scaling.positive_rate
    head = NormalizedLinear(settings.features + dim, 1, bias=False, ball="frobenius", max_norm=1000.0)
    nn.init.zeros_(head.weight)
    model = nn.Sequential(
        Clamp(-4.0, 4.0),
        RandomFeatures(
            dim,
            settings.features,
            radius=1.25 * math.sqrt(dim),
            low=settings.low,
            high=settings.high,
            linear=settings.linear,
            seed=seed,
        ),
        head,
        Shift(math.log(1 / rate - 1)),  # starts at the released prior: both classes weigh alike in the first gradient
    )
    plan = PrivacyPlan(
        population=rows, sampling_prob=q, steps=settings.steps, delta=table.delta, noise_multiplier=at_steps
    )
    spread = (rate * (1 - rate)) ** 0.25
    lr = settings.rate * math.sqrt(rows / 160_000) / spread * (1 - settings.momentum)
    engine = ClipFreeEngine(insecure_seed=2 * seed)
    engine.accountant.compose(scaling.event())
    loss = BinaryCrossEntropy()
    model, optimizer, loader = engine.attach(
        model,
        SGD(model.parameters(), lr, momentum=settings.momentum),
        TensorDataset(scaling(table.train.x), table.train.y.float()),
        loss,
        plan,
        InputDomain((dim,)),
    )
    schedule = LambdaLR(optimizer, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / settings.steps))
    averaged = copy.deepcopy(head.weight.detach())
    while optimizer.steps_taken < plan.steps:
        for x, y in loader:
            if optimizer.steps_taken >= plan.steps:
                break
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            schedule.step()
            averaged.lerp_(head.weight.detach(), 1 - settings.average)
    with torch.no_grad():
        head.weight.copy_(averaged)
    return Outcome(100 * auroc(_scores(model.eval(), scaling(table.test.x)), table.test.y), engine.get_epsilon())


@torch.no_grad()
def _scores(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part).squeeze(1) for part in x.split(32768)])
