# SPDX-License-Identifier: Apache-2.0
"""A noise schedule is in the plan before the first step, and the ledger holds exactly what it says."""

import json
import math
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.utils.data import DataLoader

from accountants import Gaussian, PoissonSampled, make_accountant
from dplip.errors import CheckpointError, PlanError
from dplip.losses import CrossEntropy
from dplip.privacy import AdaptiveLogitClip, ClipFreeEngine, ExponentialNoise, PrivacyPlan, StepNoise
from dplip.privacy.schedule import factor_at, noise_table, prefix
from tests.privacy.toy import DOMAIN, attach, data, net, plan

HALVING = ExponentialNoise(0.5, every=4)


def test_shapes() -> None:
    assert [HALVING(t) for t in range(10)] == [1.0] * 4 + [0.5] * 4 + [0.25] * 2
    steps = StepNoise(2.0, (3, 5))
    assert [steps(t) for t in range(7)] == [1.0] * 3 + [2.0] * 2 + [4.0] * 2
    assert noise_table(HALVING, 10) == ((1.0, 4), (0.5, 4), (0.25, 2))
    assert noise_table(lambda t: 1 + t, 3) == ((1.0, 1), (2.0, 1), (3.0, 1))
    assert noise_table([[1, 2], [1.0, 1], [2, 3]], 6) == ((1.0, 3), (2.0, 3))
    assert noise_table(lambda t: 1.0, 7) is None is noise_table(None, 7)
    assert noise_table(lambda t: 2.0, 7) == ((2.0, 7),)


def test_table_and_prefix_agree_with_the_function() -> None:
    table = noise_table(HALVING, 10)
    for steps in range(11):
        spread = [f for f, n in prefix(table, steps) for _ in range(n)]
        assert spread == [HALVING(t) for t in range(steps)] == [factor_at(table, t) for t in range(steps)]
    assert prefix(None, 3) == ((1.0, 3),) and prefix(None, 0) == ()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda t: 0.0,
        lambda t: -1.0,
        lambda t: math.inf,
        lambda t: math.nan,
        lambda t: "1",
        lambda t: True,
        [(1.0, 9)],
        [(1.0, 11)],
        [(1.0, 0), (1.0, 10)],
        [(1.0, 10.0)],
        [1.0] * 10,
        3,
    ],
)
def test_schedules_that_are_none_are_refused(schedule: Any) -> None:
    with pytest.raises(PlanError, match="noise_schedule"):
        plan(noise_schedule=schedule)


def test_arguments_of_the_shapes_are_checked() -> None:
    for make in (
        lambda: ExponentialNoise(0.0),
        lambda: ExponentialNoise(math.inf),
        lambda: ExponentialNoise(0.9, every=0),
        lambda: StepNoise(-1.0, (3,)),
        lambda: StepNoise(0.5, (3, 3)),
        lambda: StepNoise(0.5, (0, 3)),
    ):
        with pytest.raises(PlanError, match="noise schedule"):
            make()


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_that_of_the_steps_one_by_one(accountant: str) -> None:
    settings = plan(noise_schedule=HALVING, accountant=accountant)
    for steps in (0, 1, 4, 5, 10):
        single = make_accountant(accountant)
        for t in range(steps):
            single.compose(PoissonSampled(Gaussian(0.5 ** (t // 4)), 0.2))
        assert settings.epsilon(steps) == single.epsilon(settings.delta)
        assert settings.ledger(steps) == single.ledger
    assert settings.epsilon() > plan(accountant=accountant).epsilon()
    with pytest.raises(PlanError, match="at most the 10 steps"):
        settings.epsilon(11)
    with pytest.raises(PlanError, match="schedule"):
        settings.most_steps(1.0)


def test_calibration_covers_the_schedule() -> None:
    arguments = {"population": 100, "sampling_prob": 0.2, "steps": 10, "delta": 1e-5, "target_epsilon": 2.0}
    moving = PrivacyPlan.calibrated(noise_schedule=HALVING, **arguments)
    constant = PrivacyPlan.calibrated(**arguments)
    assert 1.99 < moving.epsilon() <= 2.0 and 1.99 < constant.epsilon() <= 2.0
    assert moving.noise_multiplier / 4 < constant.noise_multiplier < moving.noise_multiplier
    assert PrivacyPlan.calibrated(noise_schedule=lambda t: 1.0, **arguments) == constant


def test_plan_is_saved_with_its_schedule() -> None:
    settings = plan(noise_schedule=HALVING)
    again = PrivacyPlan.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings and again.digest() == settings.digest() != plan().digest()
    assert hash(again) == hash(settings)
    assert "noise_schedule" not in plan().to_dict() and PrivacyPlan.from_dict(plan().to_dict()) == plan()


def test_ledger_and_noise_follow_the_schedule() -> None:
    module = net()
    engine, optimizer = attach(module, noise_schedule=HALVING, allocation="global")
    spread, events = [], []
    for t in range(10):
        assert optimizer.noise_multiplier == 0.5 ** (t // 4)
        optimizer.step()
        total = math.hypot(*(bound.bound for bound, _ in optimizer.tensors().values()))
        spread.append(next(iter(optimizer.released_sigma.values())) / total)
        events.append(PoissonSampled(Gaussian(0.5 ** (t // 4)), 0.2))
    assert spread == pytest.approx([0.5 ** (t // 4) for t in range(10)])
    assert [e for e, n in engine.accountant.ledger for _ in range(n)] == events
    assert engine.get_epsilon() == engine.plan.epsilon()
    with pytest.raises(PlanError, match="at most 10 steps"):
        optimizer.step()


def test_noise_really_moves() -> None:
    """Standard deviation of what is released without data, before and after the drop."""
    module = net()
    _, optimizer = attach(
        module, optimizer=SGD(module.parameters(), 0.0), noise_schedule=StepNoise(0.1, (200,)), steps=400
    )
    drawn = []
    for _ in range(400):
        optimizer.zero_grad()
        optimizer.step()
        drawn.append(torch.cat([p.grad.flatten() for p in module.parameters()]).detach())
    early, late = torch.stack(drawn[:200]).std(), torch.stack(drawn[200:]).std()
    assert float(early / late) == pytest.approx(10, rel=0.1)


def test_schedulers_that_assign_the_multiplier_may_follow_the_plan_and_not_leave_it() -> None:
    _, optimizer = attach(net(), noise_schedule=ExponentialNoise(0.9))
    for t in range(4):
        optimizer.noise_multiplier = 0.9**t  # what opacus.schedulers.ExponentialNoise does
        optimizer.step()
    for wrong in (0.9**3, 0.9**5, 2.0, 0.0, math.nan):
        with pytest.raises(PlanError, match="noise_schedule="):
            optimizer.noise_multiplier = wrong
    assert optimizer.noise_multiplier == pytest.approx(0.9**3)  # assigned last, for a step that is over
    with pytest.raises(PlanError, match="noise_schedule="):
        optimizer.step()
    optimizer.noise_multiplier = 0.9 * optimizer.noise_multiplier
    optimizer.step()


def test_resumed_run_goes_on_in_the_schedule() -> None:
    engine, optimizer = attach(net(), noise_schedule=HALVING)
    for _ in range(5):
        optimizer.step()
    state = json.loads(json.dumps(engine.state_dict()))
    again, resumed = attach(net(), noise_schedule=HALVING)
    again.load_state_dict(state)
    assert resumed.noise_multiplier == 0.5 and again.accountant.ledger == engine.accountant.ledger
    for _ in range(5):
        resumed.step()
    assert again.get_epsilon() == again.plan.epsilon()
    for other in (None, ExponentialNoise(0.6, every=4)):
        changed, _ = attach(net(), noise_schedule=other)
        with pytest.raises(CheckpointError, match="noise_schedule"):
            changed.load_state_dict(state)
    forged = json.loads(json.dumps(state))
    forged["accountant"]["ledger"][1]["event"]["event"]["noise_multiplier"] = 0.9
    fresh, _ = attach(net(), noise_schedule=HALVING)
    with pytest.raises(CheckpointError, match="ledger"):
        fresh.load_state_dict(forged)


def test_clip_quantile_must_afford_the_noisiest_step() -> None:
    loss = AdaptiveLogitClip(CrossEntropy(), 1.0, noise_multiplier=3.0)
    attach(net(), loss=loss, noise_schedule=StepNoise(2.5, (5,)))
    with pytest.raises(PlanError, match="overspend"):
        attach(net(), loss=loss, noise_schedule=StepNoise(3.5, (5,)))


def test_make_private_takes_a_schedule() -> None:
    module = net()
    engine = ClipFreeEngine()
    engine.make_private_with_epsilon(
        module=module,
        optimizer=SGD(module.parameters(), 0.1),
        data_loader=DataLoader(data(), batch_size=20),
        loss=CrossEntropy(),
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=2,
        population=100,
        domain=DOMAIN,
        noise_schedule=ExponentialNoise(0.8, every=5),
    )
    assert engine.plan is not None and engine.plan.noise_schedule == ((1.0, 5), (0.8, 5))
    assert engine.plan.epsilon() <= 3.0
