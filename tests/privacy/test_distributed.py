# SPDX-License-Identifier: Apache-2.0
"""Two processes and one are the same mechanism: weights, noise, ledger, whatever way the model is spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import TensorDataset

from dplip.layers import GroupSort, LinfDistance, NormalizedLinear, Scale
from dplip.losses import CrossEntropy
from dplip.privacy import AdaptiveLogitClip, ClipFreeEngine, DistributedClipFreeEngine, PrivacyPlan
from dplip.privacy.distributed_optimizer import ReplicatedOptimizer
from dplip.privacy.distributed_ranks import Ranks
from tests.privacy.ranks import values
from tests.privacy.toy import CLASSES, DIM, DOMAIN, plan

LAYOUTS = ("plain", "ddp", "fsdp2")
STEPS = 6


def dataset(n: int = 41) -> TensorDataset:
    x = torch.rand(n, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] * CLASSES).long())


def mixed_net() -> nn.Sequential:
    """Projections of every kind of scope: a whole matrix, rows, none. Sizes that no two ranks share evenly."""
    torch.manual_seed(1)
    return nn.Sequential(
        NormalizedLinear(DIM, 7, orthogonalize=1),
        GroupSort(7),
        nn.Sequential(NormalizedLinear(7, 5, ball="rows_l1"), LinfDistance(5, CLASSES)),
        Scale(-1.0),
    ).double()


def laid_out(module: nn.Module, layout: str) -> nn.Module:
    if layout == "ddp":
        return DistributedDataParallel(module)
    if layout == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
        fully_shard(module[2], mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module


def whole(t: Tensor) -> Tensor:
    full: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return full.detach().cpu().clone()


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in module.named_parameters()}


def train(
    engine: ClipFreeEngine, module: nn.Module, loss: nn.Module, settings: PrivacyPlan, batches: list[Tensor] | None
) -> dict[str, Any]:
    """A few steps; on drawn batches, or on given ones."""
    optimizer = SGD(module.parameters(), 0.5, momentum=0.9)
    _, private, loader = engine.attach(module, optimizer, dataset(), loss, settings, DOMAIN)
    record: dict[str, Any] = {"drawn": [], "grads": [], "sigma": []}
    device = next(module.parameters()).device
    for step in range(STEPS):
        index = loader.sampler.draw() if batches is None else batches[step]
        x, y = (t.to(device) for t in loader.batch(index))
        private.zero_grad()
        loss(module(x), y).backward()
        private.step()
        record["drawn"].append(index)
        record["sigma"].append(private.released_sigma)
        record["grads"].append(
            {n: whole(p.grad) for n, p in private.sensitivity.trainable.items() if p.grad is not None}
        )
    return record | {"weights": whole_weights(module), "state": engine.state_dict()}


QUIET, NOISY = (plan(noise_multiplier=z, population=41, sampling_prob=0.3) for z in (0.0, 0.7))
RUNS = {
    "quiet": (QUIET, False),
    "noisy": (NOISY, False),
    "quiet quantile": (QUIET, True),
    "noisy quantile": (NOISY, True),
}


def once(
    engine: ClipFreeEngine, layout: str, name: str, batches: list[Tensor] | None = None, device: str = "cpu"
) -> dict[str, Any]:
    settings, adaptive = RUNS[name]
    loss = AdaptiveLogitClip(CrossEntropy(4.0), 0.9, norm="l2", every=2) if adaptive else CrossEntropy(4.0)
    record = train(engine, laid_out(mixed_net().to(device), layout), loss, settings, batches)
    return record | {"bound": loss.bound if adaptive else None}


def train_ranks(rank: int, layout: str, device: str = "cpu") -> dict[str, dict[str, Any]]:
    return {name: once(DistributedClipFreeEngine(insecure_seed=5), layout, name, device=device) for name in RUNS}


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, dict[str, Any]]]]:
    """What both ranks did in each of :data:`RUNS`, in one layout."""
    return request.param, values(train_ranks, request.param)


def alone(records: list[dict[str, Any]], name: str, device: str = "cpu") -> dict[str, Any]:
    """One process on the union of the ranks' batches."""
    drawn = [torch.cat([r["drawn"][step] for r in records]) for step in range(STEPS)]
    assert all(len(index) == len(index.unique()) for index in drawn)
    return once(ClipFreeEngine(insecure_seed=5), "plain", name, [index.sort()[0] for index in drawn], device)


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_reach_the_weights_of_one(runs: tuple[str, list[dict[str, Any]]], name: str) -> None:
    layout, everything = runs
    first, second = records = [by_name[name] for by_name in everything]
    one = alone(records, name)
    assert all(torch.equal(first["weights"][n], second["weights"][n]) for n in one["weights"])
    assert first["bound"] == second["bound"] and first["sigma"] == second["sigma"]
    if layout != "fsdp2" or name.startswith("quiet"):  # rank 0 draws the one-process noise, so noisy weights agree too
        assert_close(first["weights"], one["weights"])
        if one["bound"] is not None:
            assert first["bound"] == pytest.approx(one["bound"], rel=1e-12) and one["bound"] != 0.9


@pytest.mark.parametrize("name", RUNS)
def test_ledger_scales_and_epsilon_are_those_of_one_process(runs: tuple[str, list[dict[str, Any]]], name: str) -> None:
    first, second = records = [by_name[name] for by_name in runs[1]]
    one = alone(records, name)
    assert first["state"] == second["state"] == one["state"] and first["state"]["steps_taken"] == STEPS
    assert first["sigma"][0] == one["sigma"][0]
    engine, module = ClipFreeEngine(), mixed_net()
    engine.attach(module, SGD(module.parameters(), 0.1), dataset(), CrossEntropy(), RUNS[name][0], DOMAIN)
    engine.load_state_dict(second["state"])
    assert engine.get_epsilon() == RUNS[name][0].epsilon(STEPS)


def steps_without_batches(rank: int) -> int:
    module = mixed_net()
    engine = DistributedClipFreeEngine()
    _, private, _ = engine.attach(module, SGD(module.parameters(), 0.1), dataset(), CrossEntropy(), plan(), DOMAIN)
    for _ in range(3):
        private.step()
    return engine.accountant.ledger[0][1]


def test_a_loop_without_batches_spends_all_the_same() -> None:
    assert values(steps_without_batches) == [3, 3]


WIDE = 2000


def measure_noise(rank: int, layout: str, mutation: str | None, device: str = "cpu") -> list[float]:
    """Mean square of released noise over what the plan asks for, per tensor, and the overlap of both halves."""
    if mutation == "every rank":  # each rank noises what it contributes
        quiet = ReplicatedOptimizer._release

        def loud(self: ReplicatedOptimizer, gradients: dict[str, Tensor], sigma: dict[str, float]) -> None:
            quiet(self, {n: self.noise.add_(g.clone(), sigma[n] * (rank > 0)) for n, g in gradients.items()}, sigma)

        ReplicatedOptimizer._release = loud  # type: ignore[method-assign]
    if mutation == "nobody":
        Ranks.first = property(lambda self: False)  # type: ignore[assignment, method-assign]
    torch.manual_seed(1)
    module = (
        nn.Sequential(NormalizedLinear(DIM, WIDE), GroupSort(2), NormalizedLinear(WIDE, CLASSES)).double().to(device)
    )
    module = laid_out(nn.Sequential(*module[:2], module[2:]), layout)
    engine = DistributedClipFreeEngine(insecure_seed=None if mutation else 11)
    settings = plan(sampling_prob=1e-9, population=10**6, steps=40, noise_multiplier=2.0)
    _, private, loader = engine.attach(
        module, SGD(module.parameters(), 0.0), dataset(), CrossEntropy(), settings, DOMAIN
    )
    squares, draws, lag, halves, last = {}, 0, 0.0, 0.0, None
    for _ in range(settings.steps):
        x, y = (t.to(device) for t in loader.batch(loader.sampler.draw()))
        assert len(x) == 0
        private.zero_grad()
        CrossEntropy()(module(x), y).backward()
        private.step()
        white = []
        for name, p in private.sensitivity.trainable.items():
            z = whole(p.grad) * settings.expected_batch_size / private.released_sigma[name]
            squares.setdefault(name, []).append(z.square())
            white.append(z)
            draws += z.numel()
        lag += 0.0 if last is None else float((last * white[0]).mean()) / (settings.steps - 1)
        last, (top, bottom) = white[0], white[0].chunk(2)
        halves += float((top * bottom).mean()) / settings.steps
    assert draws > 10_000 and engine.optimizer is not None and engine.optimizer.steps_taken == settings.steps
    return [*(float(torch.stack(s).mean()) for s in squares.values()), lag, halves]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_is_added_once_with_the_variance_of_the_plan(layout: str) -> None:
    first, second = values(measure_noise, layout, None)
    assert first == second
    *ratios, lag, halves = first
    sizes = (DIM * WIDE, WIDE, CLASSES * WIDE, CLASSES)
    mean = sum(r * n for r, n in zip(ratios, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(1, abs=0.01) and ratios[0] == pytest.approx(1, abs=0.02)  # of 720,000 draws
    assert ratios == pytest.approx([1] * 4, abs=0.3)
    assert abs(lag) < 0.02 and abs(halves) < 0.02  # no step and no shard repeats another


@pytest.mark.parametrize(("mutation", "expected"), [("every rank", 2.0), ("nobody", 0.0)])
def test_the_noise_measurement_sees_noise_added_twice_or_never(mutation: str, expected: float) -> None:
    for ratios in values(measure_noise, "plain", mutation):
        assert ratios[0] == pytest.approx(expected, abs=0.05)
