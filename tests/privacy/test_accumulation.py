# SPDX-License-Identifier: Apache-2.0
"""A draw in parts gives the step of the whole draw, and no example can count twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from dplip.errors import PlanError
from dplip.losses import CrossEntropy
from dplip.multiplicity import AugmentationMultiplicity, augmented
from dplip.privacy import AdaptiveLogitClip, ClipFreeEngine, ClipFreeOptimizer, virtual_batches
from tests.privacy.toy import CLASSES, DIM, attach, data, net, plan, same, weights

LOSS = CrossEntropy()


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(n, DIM), torch.arange(n) % CLASSES


def train(module: nn.Module, optimizer: ClipFreeOptimizer, batches: Any) -> list[int]:
    """The plain loop; returns the sizes seen."""
    sizes = []
    for x, y in batches:
        optimizer.zero_grad()
        LOSS(module(x), y).backward()
        optimizer.step()
        sizes.append(len(x))
    return sizes


def problem(seed: int = 3, **changes: Any) -> tuple[nn.Module, ClipFreeEngine, ClipFreeOptimizer]:
    torch.manual_seed(0)
    module = net().double()
    engine = ClipFreeEngine(insecure_seed=seed)
    dataset = data()
    dataset.tensors = (dataset.tensors[0].double(), dataset.tensors[1])
    engine.attach(module, SGD(module.parameters(), 0.1, momentum=0.9), dataset, LOSS, plan(**changes))
    assert engine.optimizer is not None
    return module, engine, engine.optimizer


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_parts_give_the_step_of_the_whole_draw(size: int) -> None:
    module, engine, optimizer = problem()
    whole = train(module, optimizer, engine.loader)
    again, engine_again, optimizer_again = problem()
    with virtual_batches(engine_again.loader, optimizer_again, size) as batches:
        sizes = train(again, optimizer_again, batches)
    assert max(sizes) <= size and sum(sizes) == sum(whole) and len(sizes) >= len(whole) == 5
    assert optimizer_again.steps_taken == engine_again.accountant.steps == 5
    for p, q in zip(module.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_step_and_zero_grad_wait_for_the_last_part() -> None:
    module, engine, optimizer = problem(sampling_prob=1.0)
    start, seen, total = weights(module), 0, []
    for x, y in virtual_batches(engine.loader, optimizer, 25):  # 60 examples: 25, 25, 10
        optimizer.zero_grad()
        LOSS(module(x), y).backward()
        seen += len(x)
        if seen < 60:
            optimizer.step()
            assert same(start, weights(module)) and engine.accountant.steps == 0
        else:
            total = [p.grad.clone() for p in module.parameters()]
    assert all(p.grad is None for p in module.parameters())  # the draw was not released, so it is dropped
    x, y = engine.loader.dataset.tensors
    LOSS(module(x), y).backward()
    for p, g in zip(module.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_gradients_may_be_accumulated_without_calls_between_parts() -> None:
    module, engine, optimizer = problem(sampling_prob=1.0)
    for x, y in virtual_batches(engine.loader, optimizer, 25):
        LOSS(module(x), y).backward()
        if optimizer.guard.part.last:
            optimizer.step()
            optimizer.zero_grad()
    assert engine.accountant.steps == 1


def test_empty_draws_are_released() -> None:
    module, engine, optimizer = problem(population=100_000, sampling_prob=1e-5, steps=100_000)
    before = weights(module)
    with virtual_batches(engine.loader, optimizer, 4) as batches:
        for (x, y), _ in zip(batches, range(5), strict=False):
            assert len(x) == 0
            optimizer.zero_grad()
            LOSS(module(x), y).backward()
            optimizer.step()
    assert engine.accountant.steps == 5 and not same(before, weights(module))


def in_parts(attack: Callable[[nn.Module, ClipFreeOptimizer, list[tuple[Tensor, Tensor]]], None]) -> str:
    """Run ``attack``, which hands out and uses parts by itself, and return why it was refused."""
    module, engine, optimizer = problem()
    before = weights(module)
    batches = [(torch.rand(4, DIM, dtype=torch.float64), torch.arange(4) % CLASSES) for _ in range(4)]
    with pytest.raises(PlanError) as error:
        attack(module, optimizer, batches)
    assert same(before, weights(module)) and engine.accountant.steps == 0
    optimizer.discard()
    x, y = batches[0]
    LOSS(module(x), y).backward()
    optimizer.step()
    assert engine.accountant.steps == 1 and "\n" not in str(error.value)
    return str(error.value)


def test_the_same_part_twice() -> None:
    def attack(module: nn.Module, optimizer: ClipFreeOptimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
        optimizer.signal_skip_step(True, rows=4)
        for _ in range(2):
            LOSS(module(batches[0][0]), batches[0][1]).backward()
        optimizer.signal_skip_step(False, rows=4)
        LOSS(module(batches[1][0]), batches[1][1]).backward()
        optimizer.step()

    assert "one backward pass" in in_parts(attack)


def test_the_same_part_twice_with_zero_grad_between() -> None:
    """zero_grad does nothing within a draw, so it must not forgive a second pass either."""

    def attack(module: nn.Module, optimizer: ClipFreeOptimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
        for last in (False, True):
            optimizer.signal_skip_step(not last, rows=4)
            for _ in range(1 + last):
                optimizer.zero_grad()
                LOSS(module(batches[0][0]), batches[0][1]).backward()
        optimizer.step()

    assert "one backward pass" in in_parts(attack)


def test_more_rows_than_were_handed_out() -> None:
    def attack(module: nn.Module, optimizer: ClipFreeOptimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
        optimizer.signal_skip_step(False, rows=4)
        x, y = (torch.cat(t) for t in zip(*batches[:2], strict=True))
        LOSS(module(x), y).backward()
        optimizer.step()

    assert "handed out" in in_parts(attack)


def test_fetching_ahead() -> None:
    """A prefetching wrapper would let part 2 of one draw meet part 1 of the next in one step."""

    def attack(module: nn.Module, optimizer: ClipFreeOptimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
        for _ in range(2):
            optimizer.signal_skip_step(True)

    assert "fetch ahead" in in_parts(attack)
    module, engine, optimizer = problem(sampling_prob=1.0)
    with pytest.raises(PlanError, match="fetch ahead"):
        train(module, optimizer, list(virtual_batches(engine.loader, optimizer, 25)))
    train(module, optimizer, virtual_batches(engine.loader, optimizer, 25))
    assert engine.accountant.steps == 1


def test_two_draws_in_one_step() -> None:
    def attack(module: nn.Module, optimizer: ClipFreeOptimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
        for x, y in batches[:2]:
            optimizer.signal_skip_step(False, rows=4)
            LOSS(module(x), y).backward()
        optimizer.step()

    assert "draws" in in_parts(attack)


def test_a_whole_batch_before_the_parts() -> None:
    def attack(module: nn.Module, optimizer: ClipFreeOptimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
        LOSS(module(batches[0][0]), batches[0][1]).backward()
        optimizer.signal_skip_step(False, rows=4)
        LOSS(module(batches[1][0]), batches[1][1]).backward()
        optimizer.step()

    assert "draws" in in_parts(attack)


def test_graph_kept_from_an_earlier_part() -> None:
    def attack(module: nn.Module, optimizer: ClipFreeOptimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
        optimizer.signal_skip_step(True, rows=4)
        first = LOSS(module(batches[0][0]), batches[0][1])
        first.backward(retain_graph=True)
        optimizer.step()
        optimizer.signal_skip_step(False, rows=4)
        first.backward()
        optimizer.step()

    assert "one backward pass" in in_parts(attack)


def test_graph_kept_from_an_earlier_step_is_refused() -> None:
    module, engine, optimizer = problem()
    x, y = torch.rand(4, DIM, dtype=torch.float64), torch.arange(4) % CLASSES
    kept = LOSS(module(x), y)
    optimizer.step()
    with pytest.raises((PlanError, RuntimeError)):  # torch itself notices weights that its graph has saved
        kept.backward()
        optimizer.step()
    assert engine.accountant.steps == 1


@pytest.mark.parametrize("how", ["break", "raise", "break without the block"])
def test_leaving_in_the_middle_of_a_draw_drops_it(how: str) -> None:
    module, engine, optimizer = problem(sampling_prob=1.0)
    before, batches = weights(module), virtual_batches(engine.loader, optimizer, 25)
    parts = 0

    def loop() -> None:
        nonlocal parts
        for x, y in batches:
            optimizer.zero_grad()
            LOSS(module(x), y).backward()
            optimizer.step()
            parts += 1
            if parts == 2:
                if how == "raise":
                    raise KeyboardInterrupt
                break

    if how == "break without the block":
        loop()
    elif how == "break":
        with batches:
            loop()
    else:
        with pytest.raises(KeyboardInterrupt), batches:
            loop()
    assert same(before, weights(module)) and engine.accountant.steps == 0
    assert all(p.grad is None for p in module.parameters()) and optimizer.guard.part.last
    x, y = torch.rand(4, DIM, dtype=torch.float64), torch.arange(4) % CLASSES
    LOSS(module(x), y).backward()  # a whole batch, and then parts again
    optimizer.step()
    with batches:
        train(module, optimizer, batches)
    assert engine.accountant.steps == 2 == optimizer.steps_taken


def test_an_old_loop_that_ends_late_leaves_a_new_draw_alone() -> None:
    module, engine, optimizer = problem()
    old = iter(virtual_batches(engine.loader, optimizer, 2))
    next(old)
    optimizer.discard()
    x, y = torch.rand(4, DIM, dtype=torch.float64), torch.arange(4) % CLASSES
    LOSS(module(x), y).backward()
    old.close()
    assert all(p.grad is not None for p in module.parameters())
    optimizer.step()
    assert engine.accountant.steps == 1


def test_copies_of_an_example_count_as_its_rows() -> None:
    module, loss = net(), AugmentationMultiplicity(CrossEntropy(), 3)
    _, optimizer = attach(module, loss=loss)
    x, y = batch(4)
    optimizer.signal_skip_step(False, rows=4)
    with pytest.raises(PlanError, match="handed out"):
        module(torch.rand(13, DIM))
    loss(module(augmented(x, 3, lambda t: t.clone())), y).backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


def test_clip_quantile_counts_all_parts() -> None:
    module, loss = net(), AdaptiveLogitClip(CrossEntropy(), 1.0)
    _, optimizer = attach(module, loss=loss)
    for last in (False, True):
        optimizer.signal_skip_step(not last, rows=4)
        optimizer.zero_grad()
        x, y = batch(4)
        loss(module(x), y).backward()
        assert loss._seen is not None and loss._seen[1] == (8 if last else 4)
        optimizer.step()
    assert loss.refreshes == 1 and loss._seen is None
    loss(module(x), y).backward()
    with pytest.raises(PlanError, match="one backward pass"):
        loss(module(x), y).backward()


def test_closures_run_for_every_part() -> None:
    module, engine, optimizer = problem(sampling_prob=1.0)
    values = []
    for x, y in virtual_batches(engine.loader, optimizer, 25):

        def closure(x: Tensor = x, y: Tensor = y) -> Any:
            optimizer.zero_grad()
            loss = LOSS(module(x), y)
            loss.backward()
            return loss.detach()

        values.append(float(optimizer.step(closure)))
    assert len(values) == 3 and engine.accountant.steps == 1


@pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
def test_sizes_are_checked(size: Any) -> None:
    _, engine, optimizer = problem()
    with pytest.raises(PlanError, match="max_physical_batch_size"):
        virtual_batches(engine.loader, optimizer, size)


def test_loader_of_another_run_is_refused() -> None:
    _, engine, _ = problem()
    _, _, other = problem()
    with pytest.raises(PlanError, match="one make_private"):
        virtual_batches(engine.loader, other, 4)
