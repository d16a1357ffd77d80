# SPDX-License-Identifier: Apache-2.0
"""Departures from what was proved are stopped before anything is spent or moved."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from dplip.bounds import InputDomain
from dplip.errors import BoundViolation, DataError, DplipError, PlanError
from dplip.losses import CrossEntropy, MulticlassMargin
from dplip.privacy import ClipFreeEngine, ClipFreeOptimizer
from tests.privacy.toy import CLASSES, DIM, attach, net, same, weights

Problem = tuple[nn.Sequential, ClipFreeEngine, ClipFreeOptimizer]


@pytest.fixture
def problem() -> Problem:
    module = net()
    engine, optimizer = attach(module)
    return module, engine, optimizer


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(n, DIM), torch.arange(n) % CLASSES


@contextmanager
def refuses(problem: Problem, kind: type[DplipError], match: str) -> Iterator[None]:
    """The block raises ``kind``; ledger, step count and parameters stay."""
    module, engine, optimizer = problem
    before, ledger, steps = weights(module), engine.accountant.ledger, optimizer.steps_taken
    with pytest.raises(kind, match=match) as error:
        yield
    assert "\n" not in str(error.value)
    assert same(before, weights(module))
    assert engine.accountant.ledger == ledger and optimizer.steps_taken == steps


def recovers(problem: Problem) -> None:
    """After zero_grad the run goes on as usual."""
    module, engine, optimizer = problem
    steps = optimizer.steps_taken
    optimizer.zero_grad()
    x, y = batch()
    CrossEntropy()(module(x), y).backward()
    optimizer.step()
    assert optimizer.steps_taken == steps + 1 == engine.accountant.steps


@pytest.mark.parametrize("bad", [1.001, -0.001, 1e30, float("nan"), float("inf"), -float("inf")])
def test_input_outside_the_domain_is_refused(problem: Problem, bad: float) -> None:
    module, _, optimizer = problem
    x, y = batch()
    x[5, 2] = bad
    with refuses(problem, DataError, "training input"):
        CrossEntropy()(module(x), y).backward()
        optimizer.step()
    with refuses(problem, DataError, "training input"):
        module(input=x)
    recovers(problem)


def test_input_of_another_shape_is_refused(problem: Problem) -> None:
    with refuses(problem, DataError, "shape"):
        problem[0](torch.rand(3, DIM + 1))


def test_l2_radius_is_checked() -> None:
    module = net()
    attach(module, domain=InputDomain((DIM,), l2_radius=1.0))
    module(torch.full((2, DIM), 0.4))
    with pytest.raises(DataError, match="l_2 distance"):
        module(torch.ones(2, DIM))


def test_evaluation_is_not_checked(problem: Problem) -> None:
    module, _, optimizer = problem
    module.eval()
    module(100 * torch.randn(4, DIM))
    x = torch.rand(4, DIM, requires_grad=True)
    (g,) = torch.autograd.grad(1e3 * module(x).sum(), x)
    assert g.shape == x.shape
    module.train()
    with torch.no_grad():
        module(100 * torch.randn(4, DIM))
    assert optimizer.guard.backward_passes == 0
    recovers(problem)


WRONG: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ten times": lambda z, y: 10 * CrossEntropy()(z, y),
    "a little more": lambda z, y: 1.01 * MulticlassMargin(50.0)(z, y),
    "unscaled temperature": lambda z, y: 8 * CrossEntropy(8.0)(z, y),
    "class weights": lambda z, y: nn.functional.cross_entropy(z, y, torch.tensor([1.0, 5.0, 1.0]), reduction="sum"),
    "squares": lambda z, y: (z - 100).square().sum(),
    "logits": lambda z, y: 3 * z.abs().sum(),
    "not a number": lambda z, y: (z - z.detach()).pow(-1).sum(),
}


@pytest.mark.parametrize("name", WRONG)
def test_loss_with_larger_gradients_is_refused(problem: Problem, name: str) -> None:
    module, _, optimizer = problem
    x, y = batch(32)
    with refuses(problem, BoundViolation, "logit gradient"):
        WRONG[name](module(x), y).backward()
        optimizer.step()
    recovers(problem)


def test_one_bad_example_is_enough(problem: Problem) -> None:
    module, _, _ = problem
    x, y = batch(64)
    share = torch.ones(64)
    share[17] = 20.0
    with refuses(problem, BoundViolation, "logit gradient"):
        (share * nn.functional.cross_entropy(module(x), y, reduction="none")).sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_smaller_gradients_are_allowed(problem: Problem, reduction: str) -> None:
    module, engine, optimizer = problem
    x, y = batch()
    nn.functional.cross_entropy(module(x), y, reduction=reduction).backward()
    optimizer.step()
    assert engine.accountant.steps == 1


def test_tolerance_is_within_the_slack_of_every_type() -> None:
    for dtype, excess in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
        module = net().to(dtype)
        attach(module, loss=MulticlassMargin(50.0))
        x, y = torch.rand(4, DIM, dtype=dtype), torch.tensor([0, 1, 2, 0])
        MulticlassMargin(50.0)(module(x), y).backward()
        with pytest.raises(BoundViolation):
            ((1 + excess) * MulticlassMargin(50.0)(module(x), y)).backward()


def test_second_backward_pass_is_refused(problem: Problem) -> None:
    module, _, optimizer = problem
    x, y = batch()
    for _ in range(2):
        CrossEntropy()(module(x), y).backward()
    with refuses(problem, PlanError, "one backward pass"):
        optimizer.step()
    with refuses(problem, PlanError, "one backward pass"):
        optimizer.step()
    recovers(problem)


def test_two_backward_passes_of_one_graph_are_refused(problem: Problem) -> None:
    module, _, optimizer = problem
    x, y = batch()
    loss = CrossEntropy()(module(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    with refuses(problem, PlanError, "one backward pass"):
        optimizer.step()


def test_two_forward_passes_in_one_loss_are_refused(problem: Problem) -> None:
    module, _, optimizer = problem
    x, y = batch()
    (CrossEntropy()(module(x), y) + CrossEntropy()(module(x), y)).backward()
    with refuses(problem, PlanError, "one backward pass"):
        optimizer.step()


def test_gradient_past_the_checks_is_refused(problem: Problem) -> None:
    module, _, optimizer = problem
    x, y = batch()

    def in_evaluation_mode() -> None:
        module.eval()
        (1e3 * CrossEntropy()(module(100 * x), y)).backward()
        module.train()

    def in_evaluation_mode_after_a_checked_pass() -> None:
        CrossEntropy()(module(x), y).backward()
        in_evaluation_mode()

    def through_a_part() -> None:
        module[0](x).sum().backward()

    def through_the_parameters() -> None:
        sum(p.sum() for p in module.parameters()).backward()

    for path in (
        in_evaluation_mode,
        in_evaluation_mode_after_a_checked_pass,
        through_a_part,
        through_the_parameters,
    ):
        path()
        with refuses(problem, PlanError, "unchecked"):
            optimizer.step()
        recovers(problem)


def test_zero_grad_between_backward_passes_drops_the_first(problem: Problem) -> None:
    module, _, optimizer = problem
    x, y = batch()
    for set_to_none in (True, False):
        CrossEntropy()(module(x), y).backward()
        optimizer.zero_grad(set_to_none)
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())
        recovers(problem)


def test_copy_of_the_module_is_free_of_checks(problem: Problem) -> None:
    module, _, optimizer = problem
    twin = copy.deepcopy(module)
    (1e4 * twin(100 * torch.randn(4, DIM)).sum()).backward()
    assert optimizer.guard.backward_passes == 0
    x, _ = batch()
    assert torch.equal(twin(x), module(x))
    with pytest.raises(DataError):
        module(100 * x)


def test_removed_guard_checks_nothing(problem: Problem) -> None:
    module, _, optimizer = problem
    optimizer.guard.remove()
    (1e4 * module(100 * torch.randn(4, DIM)).sum()).backward()
    assert optimizer.guard.backward_passes == 0
