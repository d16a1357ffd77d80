# SPDX-License-Identifier: Apache-2.0
"""Opacus' schedulers, virtual batches and accountants around the clip-free engine."""

from __future__ import annotations

import math

import pytest
import torch
from opacus.schedulers import ExponentialNoise, LambdaNoise, StepNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accountants import Gaussian, PoissonSampled
from dplip import ClipFreeEngine, CrossEntropy
from dplip.errors import PlanError
from dplip.interop.opacus import data_loader, from_opacus, noise_schedule, to_opacus
from dplip.layers import LinfDistance, Scale

SCHEDULES = {
    "exponential": lambda optimizer: ExponentialNoise(optimizer, gamma=0.5),
    "step": lambda optimizer: StepNoise(optimizer, step_size=2, gamma=0.5),
    "lambda": lambda optimizer: LambdaNoise(optimizer, noise_lambda=lambda epoch: 1 / (1 + epoch)),
}
FACTORS = {"exponential": [1, 0.5, 0.25], "step": [1, 1, 0.5], "lambda": [1, 1 / 2, 1 / 3]}


def private(noise: float = 2.0, seed: int = 0, q: float = 0.2, **options):
    """Engine, model, optimizer, loader and loss of a run of 3 epochs of 5 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(LinfDistance(4, 4), Scale(-1.0))
    loss = CrossEntropy()
    engine = ClipFreeEngine(insecure_seed=seed)
    data = TensorDataset(torch.randn(40, 4), torch.randint(4, (40,)))
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=round(40 * q)),
        loss=loss,
        noise_multiplier=noise,
        steps=15,
        population=40,
        **options,
    )
    return engine, model, optimizer, loader, loss


def epoch(model, optimizer, batches, loss) -> int:
    count = 0
    for x, y in batches:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        count += 1
    return count


def multipliers(engine) -> list[float]:
    return [event.event.noise_multiplier for event, count in engine.accountant.ledger for _ in range(count)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_of_opacus_becomes_the_plan_and_drives_the_run(name):
    schedule = noise_schedule(SCHEDULES[name], every=5)
    engine, model, optimizer, loader, loss = private(noise_schedule=schedule)
    scheduler = SCHEDULES[name](optimizer)
    for _ in range(3):
        epoch(model, optimizer, loader, loss)
        if optimizer.steps_taken < 15:
            scheduler.step()
    expected = [2.0 * f for f in FACTORS[name] for _ in range(5)]
    assert multipliers(engine) == pytest.approx(expected)
    assert engine.get_epsilon() == engine.plan.epsilon() < math.inf


def test_a_scheduler_that_leaves_the_plan_is_stopped():
    _, model, optimizer, loader, loss = private(noise_schedule=noise_schedule(SCHEDULES["exponential"], every=5))
    scheduler = SCHEDULES["exponential"](optimizer)
    epoch(model, optimizer, loader, loss)
    with pytest.raises(PlanError, match="planned noise multiplier 1 for step 5, got 2"):
        epoch(model, optimizer, loader, loss)  # scheduler.step() was forgotten
    assert optimizer.steps_taken == 5
    optimizer.discard()
    scheduler.step()
    epoch(model, optimizer, loader, loss)
    with pytest.raises(PlanError, match=r"got 0\.25"):
        scheduler.step()
        scheduler.step()
    _, _, constant, _, _ = private()
    with pytest.raises(PlanError, match="noise_schedule="):
        SCHEDULES["exponential"](constant).step()


@pytest.mark.parametrize("built_before", [False, True])
def test_a_scheduler_goes_on_from_a_checkpoint(tmp_path, built_before):
    schedule = noise_schedule(SCHEDULES["exponential"], every=5)
    engine, model, optimizer, loader, loss = private(noise_schedule=schedule)
    scheduler = SCHEDULES["exponential"](optimizer)
    epoch(model, optimizer, loader, loss)
    scheduler.step()
    engine.save_checkpoint(tmp_path / "run", lr_scheduler=scheduler)
    engine, model, optimizer, loader, loss = private(noise_schedule=schedule)
    if built_before:
        scheduler = SCHEDULES["exponential"](optimizer)
        engine.load_checkpoint(tmp_path / "run", lr_scheduler=scheduler)
    else:
        other = SCHEDULES["exponential"](private(noise_schedule=schedule)[2])
        engine.load_checkpoint(tmp_path / "run", lr_scheduler=other)
        scheduler = SCHEDULES["exponential"](optimizer)
    epoch(model, optimizer, loader, loss)
    scheduler.step()
    epoch(model, optimizer, loader, loss)
    assert multipliers(engine) == [2.0] * 5 + [1.0] * 5 + [0.5] * 5


def test_a_schedule_that_is_no_factor_is_refused():
    class Lowers(ExponentialNoise):
        def get_noise_multiplier(self):
            return self.optimizer.noise_multiplier - 0.1

    with pytest.raises(PlanError, match="expected a factor"):
        noise_schedule(lambda optimizer: Lowers(optimizer, gamma=1.0), every=2)(0)
    with pytest.raises(PlanError, match="every"):
        noise_schedule(SCHEDULES["step"], every=0)


def test_virtual_batches_of_opacus_release_what_whole_draws_release():
    """Same draws, same noise stream: parts of at most 3 examples give the same weights as whole draws."""
    weights = []
    for size in (None, 3):
        engine, model, optimizer, loader, loss = private()
        if size is None:
            assert epoch(model, optimizer, loader, loss) == 5
        else:
            with BatchMemoryManager(
                data_loader=data_loader(loader), max_physical_batch_size=size, optimizer=optimizer
            ) as parts:
                assert epoch(model, optimizer, parts, loss) > 5
        assert engine.accountant.ledger == ((PoissonSampled(Gaussian(2.0), 0.2), 5),)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights)


def test_empty_draws_reach_the_step_through_opacus():
    engine, model, optimizer, loader, loss = private(q=1 / 40)
    sizes = []
    with BatchMemoryManager(data_loader=data_loader(loader), max_physical_batch_size=2, optimizer=optimizer) as parts:
        for x, y in parts:
            sizes.append(len(x))
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            if optimizer.steps_taken == 15:
                break
    assert 0 in sizes
    assert engine.accountant.steps == 15


def test_a_fetch_ahead_of_the_step_is_refused():
    _, _, optimizer, loader, _ = private()
    with BatchMemoryManager(data_loader=data_loader(loader), max_physical_batch_size=3, optimizer=optimizer) as parts:
        source = iter(parts)
        next(source)
        with pytest.raises(PlanError, match="fetch"):
            for _ in range(9):
                next(source)


def test_their_accountants_read_our_run():
    engine, model, optimizer, loader, loss = private(noise=1.5)
    epoch(model, optimizer, loader, loss)
    theirs = to_opacus(engine.accountant, "rdp")
    assert theirs.history == [(1.5, 0.2, 5)]
    assert theirs.get_epsilon(1e-3) > engine.get_epsilon(1e-3)
    assert from_opacus(theirs).ledger == engine.accountant.ledger
