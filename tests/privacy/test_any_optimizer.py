# SPDX-License-Identifier: Apache-2.0
"""Every optimizer of torch takes the private gradient as its own, or is refused before anything is spent."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as lr

from dplip.errors import PlanError
from dplip.layers import BallClip, MaxMin, NormalizedLinear
from dplip.losses import CrossEntropy
from dplip.privacy import ClipFreeOptimizer
from tests.privacy.toy import CLASSES, DIM, attach, same, weights

LOSS = CrossEntropy()
NAMES = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
)
REFUSED = {"LBFGS", "SparseAdam"}
DEFAULTS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}}


def mlp() -> nn.Sequential:
    """Matrices only, as Muon wants them."""
    torch.manual_seed(0)
    return nn.Sequential(
        BallClip(1.0),
        NormalizedLinear(DIM, 6, bias=False),
        MaxMin(),
        NormalizedLinear(6, CLASSES, bias=False),
    ).double()


def batch(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(n) % CLASSES


def variants() -> list[Any]:
    found = []
    for name in NAMES:
        if name in REFUSED:
            continue
        accepted = inspect.signature(getattr(torch.optim, name)).parameters
        for flags in ({}, {"foreach": True}, {"fused": True}, {"maximize": True}, {"capturable": False}):
            if set(flags) <= set(accepted):
                label = "-".join([name, *(f"{k}={v}" for k, v in flags.items())])
                found.append(pytest.param(name, flags, id=label))
    return found


def make(name: str, module: nn.Module, flags: dict[str, Any]) -> Optimizer:
    kind: Callable[..., Optimizer] = getattr(torch.optim, name)
    return kind(module.parameters(), **(DEFAULTS.get(name, {}) | flags))


@pytest.mark.parametrize(("name", "flags"), variants())
def test_without_noise_a_private_step_is_a_step_on_the_mean_gradient(name: str, flags: dict[str, Any]) -> None:
    module, plain = mlp(), mlp()
    try:
        inner, reference = make(name, module, flags), make(name, plain, flags)
    except (RuntimeError, TypeError) as error:  # a flag that this device or version does not have
        pytest.skip(str(error).splitlines()[0])
    _, optimizer = attach(module, optimizer=inner, noise_multiplier=0.0)
    plain.load_state_dict(module.state_dict())  # the first projection
    for seed in range(3):
        x, y = batch(seed=seed)
        optimizer.zero_grad()
        LOSS(module(x), y).backward()
        optimizer.step()
        reference.zero_grad()
        (LOSS(plain(x), y) / optimizer.expected_batch_size).backward()
        reference.step()
        for layer in (plain[1], plain[3]):
            layer.project_()
        for p, q in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "flags"), variants())
def test_with_noise_every_step_is_counted_and_moves(name: str, flags: dict[str, Any]) -> None:
    module = mlp()
    try:
        inner = make(name, module, flags)
    except (RuntimeError, TypeError) as error:
        pytest.skip(str(error).splitlines()[0])
    engine, optimizer = attach(module, optimizer=inner)
    for _ in range(3):
        before = weights(module)
        optimizer.zero_grad()
        LOSS(module(batch()[0]), batch()[1]).backward()
        optimizer.step()
        assert not same(before, weights(module)) and all(torch.isfinite(p).all() for p in module.parameters())
    assert engine.accountant.steps == 3


def test_all_of_torch_is_covered() -> None:
    assert set(NAMES) >= {"SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad"} | REFUSED


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_optimizers_that_cannot_be_private_are_refused(name: str) -> None:
    module = mlp()
    with pytest.raises(PlanError, match=name):
        attach(module, optimizer=make(name, module, {}))


def groups(module: nn.Module) -> Optimizer:
    first, last = module.parameters()
    return SGD([{"params": [first], "lr": 0.1}, {"params": [last], "lr": 0.01}], momentum=0.9)


def step(module: nn.Module, optimizer: ClipFreeOptimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    x, y = batch(seed=seed)
    LOSS(module(x), y).backward()
    optimizer.step()


def test_frozen_tensor_stays_and_leaves_its_noise_budget_to_the_others() -> None:
    module = mlp()
    engine, optimizer = attach(module, optimizer=groups(module), allocation="global")
    step(module, optimizer)
    both = optimizer.released_sigma
    module[1].weight.requires_grad_(False)
    frozen = module[1].weight.clone()
    for _ in range(2):
        step(module, optimizer)
        assert torch.equal(frozen, module[1].weight) and module[1].weight.grad is None
        assert set(optimizer.released_sigma) == {"3.weight"}
    (t, sigma) = optimizer.tensors()["3.weight"]
    assert sigma == pytest.approx(t.bound) and sigma < both["3.weight"]
    module[1].weight.requires_grad_(True)
    step(module, optimizer)
    assert optimizer.released_sigma == pytest.approx(both, rel=0.2) and not torch.equal(frozen, module[1].weight)
    assert engine.accountant.steps == 4


def test_tensor_frozen_between_backward_and_step_is_not_released() -> None:
    """Its gradient has been computed, so it must be dropped, not left behind for the optimizer to apply."""
    module = mlp()
    _, optimizer = attach(module, optimizer=groups(module), noise_multiplier=0.0)
    x, y = batch()
    LOSS(module(x), y).backward()
    module[1].weight.requires_grad_(False)
    before = module[1].weight.clone()
    optimizer.step()
    assert torch.equal(before, module[1].weight) and module[1].weight.grad is None


def test_tensor_thawed_between_backward_and_step_gets_noise_only() -> None:
    module = mlp()
    _, optimizer = attach(module, optimizer=groups(module))
    module[1].weight.requires_grad_(False)
    x, y = batch()
    LOSS(module(x), y).backward()
    module[1].weight.requires_grad_(True)
    optimizer.step()
    assert optimizer.released_sigma["1.weight"] > 0


def test_thawing_what_was_frozen_when_made_private_is_refused() -> None:
    module = mlp()
    module[1].weight.requires_grad_(False)
    engine, optimizer = attach(module, optimizer=SGD(module.parameters(), 0.1))
    step(module, optimizer)
    module[1].weight.requires_grad_(True)
    with pytest.raises(PlanError, match="freeze parameters after make_private"):
        step(module, optimizer)
    assert engine.accountant.steps == 1


def test_groups_may_be_added_and_changed_between_steps() -> None:
    module = mlp()
    first, last = module.parameters()
    engine, optimizer = attach(module, optimizer=SGD([first], 0.1))
    start = last.clone()
    step(module, optimizer)
    torch.testing.assert_close(start, last)  # up to the rounding of its projection
    optimizer.add_param_group({"params": [last], "lr": 0.2})
    step(module, optimizer)
    assert not torch.allclose(start, last) and optimizer.param_groups[1]["lr"] == 0.2
    optimizer.param_groups[0]["lr"] = 0.0
    kept = first.clone()
    step(module, optimizer)
    torch.testing.assert_close(kept, first)
    foreign = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [foreign]})
    with pytest.raises(PlanError, match="others"):
        step(module, optimizer)
    assert engine.accountant.steps == 3


def test_noise_of_every_group_setting_satisfies_the_budget() -> None:
    """z^2 sum (s/sigma)^2 = 1 whatever is frozen and whatever the learning rates are."""
    module = mlp()
    _, optimizer = attach(module, optimizer=groups(module))
    for freeze, rate in ((None, 0.1), (0, 1.0), (1, 1e-5), (None, 0.0)):
        for i, p in enumerate(module.parameters()):
            p.requires_grad_(i != freeze)
        optimizer.param_groups[0]["lr"] = rate
        spent = sum((t.bound / sigma) ** 2 for t, sigma in optimizer.tensors().values())
        assert spent == pytest.approx(1.0)


def test_a_learning_rate_schedule_moves_all_groups() -> None:
    module = mlp()
    _, optimizer = attach(module, optimizer=groups(module))
    schedule = lr.OneCycleLR(optimizer, [0.5, 0.05], total_steps=10)
    for _ in range(9):
        step(module, optimizer)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(10 * optimizer.param_groups[1]["lr"])


def test_weights_averaged_beside_the_run_are_untouched_by_it() -> None:
    module = mlp()
    _, optimizer = attach(module, optimizer=Adam(module.parameters()))
    averaged = torch.optim.swa_utils.AveragedModel(module)
    twin, start = copy.deepcopy(module), weights(module)
    for seed in range(3):
        step(module, optimizer, seed)
        averaged.update_parameters(module)
    assert same(weights(twin), start) and not same(weights(averaged.module), weights(module))
