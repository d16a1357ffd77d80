# SPDX-License-Identifier: Apache-2.0
"""One private step is one Gaussian release followed by the inner optimizer's own step."""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR

from dplip.bounds import InputDomain
from dplip.errors import BoundViolation, PlanError
from dplip.layers import LinearSpline, LinfDistance, NormalizedLinear
from dplip.losses import CrossEntropy
from dplip.privacy import ClipFreeOptimizer, allocate
from tests.privacy.toy import CLASSES, DIM, DOMAIN, attach, net, plan, same, weights

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.3),
    "momentum": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: Adam(p, 0.05, weight_decay=1e-3),
}


def batch(n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.rand(n, DIM), torch.randint(CLASSES, (n,))


def backward(module: nn.Module, x: Tensor, y: Tensor) -> None:
    CrossEntropy()(module(x), y).backward()


def train(module: nn.Module, optimizer: ClipFreeOptimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(module, *batch())
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_noise_it_is_the_plain_optimizer_on_the_public_average(name: str) -> None:
    module = nn.Sequential(LinfDistance(DIM, 6), LinearSpline(6), LinfDistance(6, CLASSES))
    plain = copy.deepcopy(module)
    reference = OPTIMIZERS[name](plain.parameters())
    _, optimizer = attach(module, optimizer=OPTIMIZERS[name](module.parameters()), noise_multiplier=0.0)
    plain[1].project_()
    for n in (12, 3, 0, 40, 12):
        x, y = batch(n)
        optimizer.zero_grad()
        backward(module, x, y)
        optimizer.step()
        reference.zero_grad()
        backward(plain, x, y)
        for p in plain.parameters():
            assert p.grad is not None
            p.grad /= 20.0  # q = 0.2 of a nominal 100, whatever the batch holds
        reference.step()
        plain[1].project_()
        assert same(weights(module), weights(plain))


def test_param_groups_keep_their_learning_rates() -> None:
    module = net()
    plain = copy.deepcopy(module)
    inner = [
        SGD([{"params": m[0].parameters()}, {"params": m[1].parameters(), "lr": 0.01}], 0.5) for m in (module, plain)
    ]
    _, optimizer = attach(module, optimizer=inner[0], noise_multiplier=0.0)
    assert optimizer.param_groups is inner[0].param_groups and optimizer.defaults is inner[0].defaults
    x, y = batch()
    backward(module, x, y)
    optimizer.step()
    backward(plain, x, y)
    for p in plain.parameters():
        assert p.grad is not None
        p.grad /= 20.0
    inner[1].step()
    assert same(weights(module), weights(plain))
    assert optimizer.state is inner[0].state


@pytest.mark.parametrize("case", ["empty batch", "no backward", "batch"])
@pytest.mark.parametrize("rule", ["minimum_energy", "equal_share", "global"])
def test_released_noise_has_the_allocated_variance(rule: str, case: str) -> None:
    module = nn.Sequential(LinfDistance(DIM, 300), LinfDistance(300, 200))
    _, optimizer = attach(
        module, optimizer=SGD(module.parameters(), 0.0), allocation=rule, steps=1000, noise_multiplier=1.7
    )
    x, y = batch(0 if case == "empty batch" else 12)
    exact = dict.fromkeys(dict(module.named_parameters()), torch.tensor(0.0))
    if case != "no backward":
        grads = torch.autograd.grad(CrossEntropy()(module(x), y), list(module.parameters()))
        exact = dict(zip(exact, grads, strict=True))
    optimizer.zero_grad()
    squares, means = dict.fromkeys(exact, 0.0), dict.fromkeys(exact, 0.0)
    draws = 250
    for _ in range(draws):
        optimizer.zero_grad()
        if case != "no backward":
            backward(module, x, y)
        optimizer.step()
        for name, p in module.named_parameters():
            assert p.grad is not None
            noise = (20.0 * p.grad - exact[name]).double()
            squares[name] += float(noise.square().sum())
            means[name] += float(noise.sum())
    spent = 0.0
    for name, (tensor, sigma) in optimizer.tensors().items():
        n = draws * tensor.dim
        assert math.sqrt(squares[name] / n) == pytest.approx(sigma, rel=4 / math.sqrt(2 * n))
        assert abs(means[name] / n) < 5 * sigma / math.sqrt(n)
        spent += (tensor.bound / sigma) ** 2
    assert spent == pytest.approx(1.7**-2)


def test_noise_is_fresh_in_every_step_and_tensor() -> None:
    module = net()
    _, optimizer = attach(module, optimizer=SGD(module.parameters(), 0.0), seed=None)
    released = []
    for _ in range(5):
        optimizer.zero_grad()
        optimizer.step()
        released += [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    values = torch.cat(released)
    assert values.unique().numel() == values.numel()


def test_ledger_grows_by_one_event_per_step() -> None:
    module = net()
    engine, optimizer = attach(module)
    for k in range(1, 5):
        train(module, optimizer, 1)
        assert engine.accountant.ledger == ((plan().step_event(), k),)
        assert optimizer.steps_taken == k
    assert engine.accountant.epsilon(1e-5) == plan().epsilon(4)


def test_spent_budget_stops_the_run() -> None:
    module = net()
    engine, optimizer = attach(module, steps=3)
    train(module, optimizer, 3)
    before = weights(module)
    ran = []
    for closure in (None, lambda: ran.append(1) or 0.0):
        with pytest.raises(PlanError, match="at most 3 steps"):
            optimizer.step(closure)
    assert not ran and same(before, weights(module))
    assert engine.accountant.steps == 3 == optimizer.steps_taken


def test_step_is_spent_before_noise_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    module = net()
    engine, optimizer = attach(module)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer.noise, "release_", interrupted)
    backward(module, *batch())
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert engine.accountant.steps == 1 == optimizer.steps_taken


def test_layers_are_projected_after_the_step() -> None:
    module = nn.Sequential(
        NormalizedLinear(DIM, 6, ball="rows_l1"), LinearSpline(6), NormalizedLinear(6, CLASSES, ball="spectral")
    )
    _, optimizer = attach(module, optimizer=SGD(module.parameters(), 50.0))
    for _ in range(3):
        train(module, optimizer, 1)
        assert float(module[0].weight.detach().abs().sum(1).max()) <= 1 + 1e-6
        assert float(module[1].slopes().detach().abs().max()) <= 1 + 1e-4
        assert float(torch.linalg.matrix_norm(module[2].weight.detach(), 2)) <= 1 + 1e-6
        assert float(module[0].weight.detach().abs().sum(1).max()) > 0.99, "the step left the ball"


def test_frozen_parameters_are_untouched() -> None:
    module = net()
    module[0].requires_grad_(False)
    before = weights(module)
    _, optimizer = attach(module, optimizer=SGD(module.parameters(), 1.0, weight_decay=0.1))
    train(module, optimizer, 3)
    after = weights(module)
    assert torch.equal(before["0.weight"], after["0.weight"]) and torch.equal(before["0.bias"], after["0.bias"])
    assert not torch.equal(before["1.weight"], after["1.weight"])
    assert set(optimizer.tensors()) == {"1.weight", "1.bias"}


def test_parameter_unfrozen_later_is_refused() -> None:
    module = net()
    module[0].weight.requires_grad_(False)
    engine, optimizer = attach(module)
    module[0].weight.requires_grad_(True)
    for refreeze in (False, True):
        optimizer.zero_grad()
        backward(module, *batch())
        module[0].weight.requires_grad_(not refreeze)
        before = weights(module)
        with pytest.raises(PlanError, match="trainable when it was made private"):
            optimizer.step()
        assert same(before, weights(module)) and engine.accountant.steps == 0
        module[0].weight.requires_grad_(True)


def test_foreign_parameters_are_refused() -> None:
    module, other = net(), nn.Parameter(torch.zeros(3))
    for parameters in ([other], [*module.parameters(), other]):
        with pytest.raises(PlanError, match="module"):
            attach(module, optimizer=SGD(parameters, 0.1))
    _, optimizer = attach(module)
    optimizer.add_param_group({"params": [other]})
    with pytest.raises(PlanError, match="module"):
        optimizer.step()


def test_optimizer_that_calls_its_closure_is_refused() -> None:
    module = net()
    with pytest.raises(PlanError, match="LBFGS"):
        attach(module, optimizer=LBFGS(module.parameters()))


def test_gradients_from_before_are_dropped() -> None:
    module = net()
    (1e6 * module(torch.rand(50, DIM)).sum()).backward()
    _, optimizer = attach(module, optimizer=SGD(module.parameters(), 1.0), noise_multiplier=0.0)
    before = weights(module)
    optimizer.step()
    assert same(before, weights(module))


def test_gradient_of_a_parameter_outside_the_optimizer_does_not_pile_up() -> None:
    module = net()
    _, optimizer = attach(module, optimizer=SGD(module[1].parameters(), 0.1), noise_multiplier=0.0)
    x, y = batch()
    for _ in range(3):
        optimizer.zero_grad()
        backward(module, x, y)
    once = torch.autograd.grad(CrossEntropy()(module(x), y), module[0].weight)[0]
    assert torch.equal(module[0].weight.grad, once)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_refused(bad: float) -> None:
    module = net()
    engine, optimizer = attach(module)
    backward(module, *batch())
    module[0].weight.grad[1, 2] = bad
    before = weights(module)
    with pytest.raises(BoundViolation, match=r"0\.weight"):
        optimizer.step()
    assert same(before, weights(module)) and engine.accountant.steps == 0


def test_gradient_whose_sum_overflows_is_finite() -> None:
    module = net()
    engine, optimizer = attach(module)
    backward(module, *batch())
    module[0].weight.grad.fill_(3e38)
    optimizer.step()
    assert engine.accountant.steps == 1


def test_interrupted_release_is_counted_and_its_noise_never_drawn_again() -> None:
    """After a failure in the middle of the noise, the next step draws what no earlier attempt has drawn."""
    module = nn.Sequential(LinfDistance(DIM, 300), LinfDistance(300, 200))
    engine, optimizer = attach(module, optimizer=SGD(module.parameters(), 0.0))
    seen: list[Tensor] = []
    draw = optimizer.noise._draw

    def watched(n: int, device: torch.device, stop: bool) -> Any:
        for offset, block in draw(n, device):
            seen.append(block.clone())
            if stop:
                raise KeyboardInterrupt
            yield offset, block

    for stop in (True, False, True, False):
        optimizer.zero_grad()
        backward(module, *batch())
        optimizer.noise._draw = lambda n, device, stop=stop: watched(n, device, stop)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            optimizer.step()
    assert engine.accountant.steps == 4 == optimizer.steps_taken
    values = torch.cat(seen)
    assert len(seen) == 6 and values.unique().numel() == values.numel()


class SideDoor(nn.Module):
    """Computes something from a parameter on which its output does not depend."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = LinfDistance(DIM, CLASSES), LinfDistance(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def test_gradient_where_none_was_proved_is_refused() -> None:
    module = SideDoor()
    engine, optimizer = attach(module)
    x, y = batch()
    (CrossEntropy()(module(x), y) + module.side(x).sum()).backward()
    with pytest.raises(BoundViolation, match=r"side\."):
        optimizer.step()
    assert engine.accountant.steps == 0
    optimizer.zero_grad()
    backward(module, x, y)
    before = module.side.weight.detach().clone()
    optimizer.step()
    assert torch.equal(before, module.side.weight) and engine.accountant.steps == 1


def test_noise_fits_the_layer_that_made_the_gradient() -> None:
    """Annealing p between backward and step must not shrink the noise of the gradient already computed."""
    module = nn.Sequential(LinfDistance(DIM, CLASSES, p=math.inf))
    _, optimizer = attach(module, allocation="global")
    wide = optimizer.tensors()["0.weight"][1]
    backward(module, *batch())
    module[0].p = 2.0
    assert optimizer.tensors()["0.weight"][1] < wide
    seen: list[float] = []
    release = optimizer.noise.release_

    def spy(sums: Sequence[Tensor], sigmas: Sequence[float], divisor: float = 1.0) -> None:
        seen.extend(sigmas)
        release(sums, sigmas, divisor)

    optimizer.noise.release_ = spy  # type: ignore[method-assign]
    optimizer.step()
    assert seen == [wide, wide]
    optimizer.zero_grad()
    optimizer.step()
    assert seen[2] < wide


def test_sigma_follows_the_weights() -> None:
    module = nn.Sequential(nn.Linear(DIM, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    _, optimizer = attach(module, optimizer=SGD(module.parameters(), 5.0), domain=DOMAIN)
    before = optimizer.tensors()
    train(module, optimizer, 2)
    after = optimizer.tensors()
    assert before["0.weight"] != after["0.weight"]
    for tensors in (before, after):
        bounds = {name: t for name, (t, _) in tensors.items()}
        assert {n: s for n, (_, s) in tensors.items()} == allocate("minimum_energy", bounds, 1.0)


def test_slow_groups_carry_more_noise_at_the_same_cost() -> None:
    module = net()
    groups = [{"params": module[0].parameters(), "lr": 1e-3}, {"params": module[1].parameters(), "lr": 1.0}]
    _, optimizer = attach(module, optimizer=SGD(groups, 0.1))
    uneven = optimizer.tensors()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    even = optimizer.tensors()
    assert uneven["0.weight"][1] > even["0.weight"][1] and uneven["1.weight"][1] < even["1.weight"][1]
    for tensors in (uneven, even):
        assert sum((t.bound / s) ** 2 for t, s in tensors.values()) == pytest.approx(1.0)
    for lr in (0.0, float("inf"), -1.0):
        for group in optimizer.param_groups:
            group["lr"] = lr
        assert sum((t.bound / s) ** 2 for t, s in optimizer.tensors().values()) == pytest.approx(1.0)


SCHEDULES: dict[str, tuple[Callable[[Optimizer], LRScheduler], Callable[[Any], Optimizer]]] = {
    "StepLR": (lambda o: StepLR(o, 2, 0.5), lambda p: SGD(p, 0.1)),
    "LambdaLR": (lambda o: LambdaLR(o, lambda k: 1 / (k + 1)), lambda p: SGD(p, 0.1)),
    "OneCycleLR sgd": (lambda o: OneCycleLR(o, 0.2, total_steps=6), lambda p: SGD(p, 0.1, momentum=0.9)),
    "OneCycleLR adam": (lambda o: OneCycleLR(o, 0.2, total_steps=6), lambda p: Adam(p, 0.1)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_drive_the_wrapped_optimizer(name: str) -> None:
    make_schedule, make_optimizer = SCHEDULES[name]
    module = net()
    _, optimizer = attach(module, optimizer=make_optimizer(module.parameters()))
    schedule = make_schedule(optimizer)
    plain_optimizer = make_optimizer(net().parameters())
    plain_schedule = make_schedule(plain_optimizer)
    for _ in range(5):
        train(module, optimizer, 1)
        schedule.step()
        plain_optimizer.step()
        plain_schedule.step()
        assert optimizer.param_groups[0]["lr"] == plain_optimizer.param_groups[0]["lr"]
        assert optimizer.original_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert optimizer.steps_taken == 5


def test_closure_is_run_with_gradients() -> None:
    module = net()
    engine, optimizer = attach(module)
    x, y = batch()

    def closure() -> float:
        optimizer.zero_grad()
        loss = CrossEntropy()(module(x), y)
        loss.backward()
        return float(loss.detach())

    before = float(CrossEntropy()(module(x), y).detach())
    assert optimizer.step(closure) == pytest.approx(before)
    assert engine.accountant.steps == 1
    assert optimizer.step() is None


def test_state_dict_round_trip() -> None:
    module = net()
    _, optimizer = attach(module, optimizer=Adam(module.parameters(), 0.05), noise_multiplier=0.0)
    train(module, optimizer, 3)
    saved, values = copy.deepcopy(optimizer.state_dict()), weights(module)
    x, y = batch()

    def finish(target: nn.Module, opt: ClipFreeOptimizer) -> dict[str, Tensor]:
        opt.zero_grad()
        backward(target, x, y)
        opt.step()
        return weights(target)

    expected = finish(module, optimizer)
    twin = net()
    twin.load_state_dict(values)
    _, again = attach(twin, optimizer=Adam(twin.parameters(), 0.9), noise_multiplier=0.0)
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == 0.05
    assert same(finish(twin, again), expected)


def test_step_hooks_see_every_private_step() -> None:
    module = net()
    _, optimizer = attach(module)
    seen: list[int] = []
    optimizer.attach_step_hook(lambda o: seen.append(o.steps_taken))
    train(module, optimizer, 3)
    assert seen == [1, 2, 3]
    assert (optimizer.noise_multiplier, optimizer.expected_batch_size) == (1.0, 20.0)


def test_wrapper_is_a_torch_optimizer() -> None:
    module = net()
    _, optimizer = attach(module, domain=InputDomain((DIM,)))
    assert isinstance(optimizer, Optimizer) and "SGD" in repr(optimizer) and "noise_multiplier" in repr(optimizer)
