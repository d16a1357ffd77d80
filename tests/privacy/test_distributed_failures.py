# SPDX-License-Identifier: Apache-2.0
"""Ranks that fail, disagree or fall silent: all stop, nothing hangs, nothing is spent for what was not released."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import TensorDataset

from dplip.errors import BoundViolation, PlanError, RankError
from dplip.losses import CrossEntropy
from dplip.privacy import ClipFreeEngine, DistributedClipFreeEngine, virtual_batches
from tests.privacy.ranks import run, values
from tests.privacy.test_distributed import LAYOUTS, assert_close, dataset, laid_out, mixed_net
from tests.privacy.toy import DOMAIN, plan, same, weights

LOSS = CrossEntropy(4.0)


def private(layout: str = "plain", **changes: Any) -> tuple[DistributedClipFreeEngine, nn.Module, Any, Any]:
    module = laid_out(mixed_net(), layout)
    engine = DistributedClipFreeEngine()
    optimizer = SGD(module.parameters(), 0.1)
    _, optimizer, loader = engine.attach(module, optimizer, dataset(), LOSS, plan(**changes), DOMAIN)
    return engine, module, optimizer, loader


def step(module: nn.Module, optimizer: Any, loader: Any) -> int:
    x, y = loader.batch(loader.sampler.draw())
    optimizer.zero_grad()
    LOSS(module(x), y).backward()
    optimizer.step()
    return len(x)


def rarely_sampled(rank: int, layout: str) -> tuple[int, int]:
    engine, module, optimizer, loader = private(layout, sampling_prob=0.01, population=41, steps=25)
    drawn = sum(step(module, optimizer, loader) for _ in range(25))
    assert len(engine.accountant.ledger) == 1
    return drawn, optimizer.steps_taken


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_local_batches_are_steps(layout: str) -> None:
    answers = values(rarely_sampled, layout)
    assert [steps for _, steps in answers] == [25, 25]
    assert sum(drawn for drawn, _ in answers) < 40  # so most of the 50 local batches were empty


def skipped_by_the_loop(rank: int) -> int:
    _, module, optimizer, loader = private(sampling_prob=0.02, population=41)
    for _ in range(8):
        x, y = loader.batch(loader.sampler.draw())
        optimizer.zero_grad()
        if len(x):  # the loop of someone who fears empty batches
            LOSS(module(x), y).backward()
        optimizer.step()
    steps: int = optimizer.steps_taken
    return steps


def test_a_loop_that_skips_empty_batches_stays_in_step() -> None:
    assert values(skipped_by_the_loop) == [8, 8]


def in_parts(rank: int, layout: str) -> tuple[dict[str, torch.Tensor], list[int], int]:
    """Whole draws of each rank in parts of 20: four steps, more passes on the rank that owns more."""
    _, module, optimizer, loader = private(layout, sampling_prob=1.0, population=41, noise_multiplier=0.0, steps=4)
    passes = []
    for _ in range(4):
        with virtual_batches(loader, optimizer, max_physical_batch_size=20) as batches:
            for x, y in batches:
                passes.append(len(x))
                optimizer.zero_grad()
                LOSS(module(x), y).backward()
                optimizer.step()
    return weights(module), passes, optimizer.steps_taken


def test_ranks_may_split_their_draws_in_different_numbers_of_parts() -> None:
    (first, many, taken), (second, few, _) = values(in_parts, "plain")
    assert many == [20, 1] * 4 and few == [20] * 4 and taken == 4
    module = mixed_net()
    engine = ClipFreeEngine()
    settings = plan(sampling_prob=1.0, population=41, noise_multiplier=0.0)
    _, optimizer, loader = engine.attach(module, SGD(module.parameters(), 0.1), dataset(), LOSS, settings, DOMAIN)
    for _ in range(4):
        step(module, optimizer, loader)
    assert_close(first, weights(module))
    assert same(first, second)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_parts_are_refused_where_backward_waits_for_all_ranks(layout: str) -> None:
    for answer in run(in_parts, layout):
        assert isinstance(answer, PlanError) and "pass the module without DDP or FSDP2" in str(answer)


def poisoned(rank: int, layout: str) -> tuple[str, int, int]:
    """Rank 1's gradient turns NaN in the second step; what each rank raised and how much was spent."""
    engine, module, optimizer, loader = private(layout, sampling_prob=1.0)
    step(module, optimizer, loader)
    optimizer.zero_grad()
    x, y = loader.batch(loader.sampler.draw())
    LOSS(module(x), y).backward()
    if rank == 1:
        gradient = next(iter(optimizer.sensitivity.trainable.values())).grad
        (gradient.to_local() if layout == "fsdp2" else gradient).fill_(float("nan"))
    try:
        optimizer.step()
    except (BoundViolation, RankError) as error:
        return type(error).__name__, optimizer.steps_taken, engine.accountant.ledger[0][1]
    return "nothing", optimizer.steps_taken, engine.accountant.ledger[0][1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_that_refuses_stops_all_and_nothing_is_spent(layout: str) -> None:
    assert values(poisoned, layout) == [("RankError", 1, 1), ("BoundViolation", 1, 1)]


def gives_up(rank: int, layout: str) -> None:
    _, module, optimizer, loader = private(layout, sampling_prob=0.5)
    step(module, optimizer, loader)
    if rank == 1:
        raise ValueError("out of patience")
    step(module, optimizer, loader)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_raises_outside_a_step_ends_the_others(layout: str) -> None:
    first, second = run(gives_up, layout)
    assert isinstance(second, ValueError)
    assert isinstance(first, (RankError, RuntimeError)), first
    if layout == "plain":
        assert isinstance(first, RankError) and "restart all from the last checkpoint" in str(first)


def disagrees(rank: int, about: str) -> int:
    _, module, optimizer, loader = private(sampling_prob=0.5)
    step(module, optimizer, loader)
    if rank == 1 and about == "steps taken":
        optimizer.steps_taken += 1
    if rank == 1 and about == "lr":
        optimizer.param_groups[0]["params"], rest = optimizer.param_groups[0]["params"][:1], module[2].parameters()
        optimizer.original_optimizer.add_param_group({"params": list(rest), "lr": 0.01})
    if about == "weights":
        optimizer.compare_next = True  # as after a resume
        if rank == 1:
            with torch.no_grad():
                next(module.parameters())[0, 0] += 1e-3
    step(module, optimizer, loader)
    steps: int = optimizer.steps_taken
    return steps


@pytest.mark.parametrize("about", ["steps taken", "lr", "weights"])
def test_ranks_that_drift_apart_are_stopped(about: str) -> None:
    for answer in run(disagrees, about):
        assert isinstance(answer, RankError) and f"same {about} on every rank" in str(answer)
    assert values(disagrees, "nothing") == [2, 2]


class Unreadable(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        raise OSError("the disk is gone")


def starts_differently(rank: int, what: str) -> None:
    module, data, settings, rate = mixed_net(), dataset(), plan(), 0.1
    if rank == 1:
        if what == "plan":
            settings = plan(noise_multiplier=2.0)
        if what == "number of examples":
            data = dataset(40)
        if what == "optimizer":
            rate = 0.2
        if what == "refusal":
            data = Unreadable(*data.tensors)
    optimizer = SGD(module.parameters(), rate)
    DistributedClipFreeEngine().attach(module, optimizer, data, LOSS, settings, DOMAIN)


@pytest.mark.parametrize("what", ["plan", "number of examples", "optimizer"])
def test_ranks_must_start_from_one_configuration(what: str) -> None:
    for answer in run(starts_differently, what):
        assert isinstance(answer, RankError) and what in str(answer)


def test_one_rank_that_cannot_start_stops_all() -> None:
    first, second = run(starts_differently, "refusal")
    assert isinstance(second, OSError)
    assert isinstance(first, RankError) and "on rank 1: OSError: the disk is gone" in str(first)


def no_sync(rank: int, layout: str) -> list[str]:
    _, module, optimizer, loader = private(layout, sampling_prob=1.0)
    said = []
    x, y = loader.batch(loader.sampler.draw())
    if layout == "ddp":
        with module.no_sync():
            LOSS(module(x), y).backward()
    else:
        module.set_requires_gradient_sync(False)
        LOSS(module(x), y).backward()
        module.set_requires_gradient_sync(True)
    for again in (False, True):
        if again:  # FSDP would now add both batches up
            optimizer.zero_grad()
            LOSS(module(x), y).backward()
        try:
            optimizer.step()
            said.append("stepped")
        except PlanError as error:
            said.append(str(error).split(",")[0])
    assert optimizer.steps_taken == said.count("stepped")
    return said


def test_gradients_kept_back_are_refused() -> None:
    assert values(no_sync, "ddp") == [["step: expected gradients summed by DDP in backward", "stepped"]] * 2
    refused = "step: expected FSDP to sum every gradient in backward"
    assert values(no_sync, "fsdp2") == [[refused, refused]] * 2


def engine_for_one(rank: int, layout: str) -> None:
    module = laid_out(mixed_net(), layout)
    ClipFreeEngine().attach(module, SGD(module.parameters(), 0.1), dataset(), LOSS, plan(), DOMAIN)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_the_engine_for_one_process_refuses_a_module_over_several(layout: str) -> None:
    for answer in run(engine_for_one, layout):
        assert isinstance(answer, PlanError) and "use DistributedClipFreeEngine" in str(answer)


def ddp_variants(rank: int) -> list[str]:
    hooked = DistributedDataParallel(mixed_net())
    hooked.register_comm_hook(None, lambda _, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future())
    groups = [dist.new_group([r]) for r in (0, 1)]
    elsewhere = DistributedDataParallel(mixed_net(), process_group=groups[rank])
    said = []
    for module in (hooked, elsewhere):
        try:
            DistributedClipFreeEngine().attach(
                module, SGD(module.parameters(), 0.1), dataset(), LOSS, plan(sampling="poisson"), DOMAIN
            )
        except PlanError as error:
            said.append(str(error))
    return said


def test_a_ddp_module_with_other_ideas_is_refused() -> None:
    for hooked, elsewhere in values(ddp_variants):
        assert "without a communication hook" in hooked and "over the engine's process group" in elsewhere
