# SPDX-License-Identifier: Apache-2.0
"""A checkpoint holds the whole run or is refused, and a refusal changes nothing."""

import copy
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as lr

from dplip.checkpoint import load_checkpoint, save_checkpoint
from dplip.errors import CheckpointError, PlanError
from dplip.losses import BoundedLoss, CrossEntropy
from dplip.privacy import AdaptiveLogitClip, ClipFreeEngine, ClipFreeOptimizer
from tests.privacy.toy import CLASSES, DIM, attach, net, same, weights


def train(module: nn.Module, optimizer: ClipFreeOptimizer, loss: BoundedLoss, steps: int, schedulers: Any = ()) -> None:
    generator = torch.Generator().manual_seed(optimizer.steps_taken)
    for _ in range(steps):
        x = torch.rand(8, DIM, generator=generator)
        optimizer.zero_grad()
        loss(module(x), torch.arange(8) % CLASSES).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def adam(module: nn.Module) -> Optimizer:
    return Adam(module.parameters(), 0.01, amsgrad=True)


def make(
    build: Callable[[nn.Module], Optimizer] = adam, loss: BoundedLoss | None = None, **changes: Any
) -> tuple[nn.Module, ClipFreeEngine, ClipFreeOptimizer]:
    module = net()
    engine, optimizer = attach(module, optimizer=build(module), loss=loss, **changes)
    return module, engine, optimizer


def deep_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(deep_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(deep_equal, a, b))
    return bool(a == b)


def test_everything_comes_back(tmp_path: Path) -> None:
    module, engine, optimizer = make()
    schedule = lr.ExponentialLR(optimizer, 0.9)
    train(module, optimizer, CrossEntropy(), 4, [schedule])
    extra = {"p": 8.0, "history": [1, 2, {"x": torch.ones(2)}], "name": "run"}
    engine.save_checkpoint(tmp_path / "c.pt", module=module, optimizer=optimizer, lr_scheduler=schedule, extra=extra)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]

    again, other, resumed = make()
    second = lr.ExponentialLR(resumed, 0.9)
    back = other.load_checkpoint(tmp_path / "c.pt", module=again, optimizer=resumed, lr_scheduler=second)
    assert deep_equal(back, extra)
    assert same(weights(module), weights(again)) and deep_equal(optimizer.state_dict(), resumed.state_dict())
    assert other.accountant.ledger == engine.accountant.ledger and resumed.steps_taken == 4
    assert second.get_last_lr() == schedule.get_last_lr() and second.last_epoch == 4
    assert all(p.grad is None for p in again.parameters())
    train(again, resumed, CrossEntropy(), 6, [second])
    assert other.get_epsilon() == other.plan.epsilon() and second.get_last_lr() == pytest.approx([0.01 * 0.9**10])
    with pytest.raises(PlanError, match="at most 10 steps"):
        resumed.step()


def test_a_file_loads_without_running_code(tmp_path: Path) -> None:
    _, engine, _ = make()
    engine.save_checkpoint(str(tmp_path / "c.pt"))
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert state["rng"] == "fresh" and not any("generator" in k or "state" in k for k in state)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_resumed_run_is_the_uninterrupted_one_apart_from_noise(tmp_path: Path, noise: float) -> None:
    """Without noise, bit for bit: weights, moments and learning rates all continue."""
    torch.manual_seed(0)
    module, engine, optimizer = make(noise_multiplier=noise)
    start = copy.deepcopy(module.state_dict())
    train(module, optimizer, CrossEntropy(), 4)
    engine.save_checkpoint(tmp_path / "c.pt")
    train(module, optimizer, CrossEntropy(), 3)
    again, other, resumed = make(noise_multiplier=noise)
    again.load_state_dict(start)
    other.load_checkpoint(tmp_path / "c.pt")
    train(again, resumed, CrossEntropy(), 3)
    assert same(weights(module), weights(again)) == (noise == 0)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr.LinearLR(o, 0.5, total_iters=6),
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.1, 10),
    "SequentialLR": lambda o: lr.SequentialLR(o, [lr.ConstantLR(o, 0.5), lr.ExponentialLR(o, 0.9)], [3]),
    "ChainedScheduler": lambda o: lr.ChainedScheduler([lr.ConstantLR(o, 0.5), lr.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_schedules_go_on(name: str, tmp_path: Path) -> None:
    def sgd(module: nn.Module) -> Optimizer:
        return SGD(module.parameters(), 0.1, momentum=0.9)

    module, engine, optimizer = make(sgd)
    schedule = SCHEDULERS[name](optimizer)
    train(module, optimizer, CrossEntropy(), 4, [schedule])
    engine.save_checkpoint(tmp_path / "c.pt", lr_scheduler=schedule)
    again, other, resumed = make(sgd)
    second = SCHEDULERS[name](resumed)
    other.load_checkpoint(tmp_path / "c.pt", lr_scheduler=[second])
    for _ in range(4):
        train(module, optimizer, CrossEntropy(), 1, [schedule])
        train(again, resumed, CrossEntropy(), 1, [second])
        assert optimizer.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["momentum"] == resumed.param_groups[0]["momentum"]


def test_released_clip_comes_back(tmp_path: Path) -> None:
    loss = AdaptiveLogitClip(CrossEntropy(), 1.0, rate=2.0, noise_multiplier=50.0)
    module, engine, optimizer = make(loss=loss)
    train(module, optimizer, loss, 4)
    engine.save_checkpoint(tmp_path / "c.pt")
    fresh = AdaptiveLogitClip(CrossEntropy(), 1.0, rate=2.0, noise_multiplier=50.0)
    again, other, resumed = make(loss=fresh)
    other.load_checkpoint(tmp_path / "c.pt")
    assert fresh.bound == loss.bound != 1.0
    assert resumed.guard.cotangent == optimizer.guard.cotangent
    assert {n: t for n, (t, _) in resumed.tensors().items()} == {n: t for n, (t, _) in optimizer.tensors().items()}
    train(again, resumed, fresh, 1)


def two_groups(module: nn.Module) -> Optimizer:
    first, *rest = module.parameters()
    return SGD([{"params": [first]}, {"params": rest, "lr": 0.01}], 0.1, momentum=0.9)


def swapped(module: nn.Module) -> Optimizer:
    *rest, last = module.parameters()
    return SGD([{"params": rest}, {"params": [last], "lr": 0.01}], 0.1, momentum=0.9)


def wider() -> nn.Module:
    module = net()
    module[0].register_buffer("extra", torch.zeros(2))
    return module


def test_another_run_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    module, engine, optimizer = make(two_groups)
    train(module, optimizer, CrossEntropy(), 4)
    engine.save_checkpoint(tmp_path / "c.pt", lr_scheduler=lr.StepLR(optimizer, 2))
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("plan", {"steps": 11}, True),
        ("parameter groups", {"build": swapped}, True),
        ("parameter groups", {"build": adam}, True),
        ("lr schedulers", {}, False),
    ]
    for match, changes, scheduled in cases:
        again, other, resumed = make(**({"build": two_groups} | changes))
        before = weights(again)
        with pytest.raises(CheckpointError, match=match) as error:
            other.load_checkpoint(tmp_path / "c.pt", lr_scheduler=lr.StepLR(resumed, 2) if scheduled else None)
        assert "\n" not in str(error.value)
        assert same(before, weights(again)) and resumed.steps_taken == 0 and not other.accountant.ledger
    again = wider()
    other, resumed = attach(again, optimizer=two_groups(again))
    with pytest.raises(CheckpointError, match="saved module"):
        other.load_checkpoint(tmp_path / "c.pt", lr_scheduler=lr.StepLR(resumed, 2))
    again = net()
    next(iter(again.parameters())).requires_grad_(False)
    other, resumed = attach(again, optimizer=two_groups(again))
    with pytest.raises(CheckpointError, match="trainable"):
        other.load_checkpoint(tmp_path / "c.pt", lr_scheduler=lr.StepLR(resumed, 2))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    module, engine, optimizer = make()
    train(module, optimizer, CrossEntropy(), 2)
    engine.save_checkpoint(tmp_path / "c.pt")
    good, (again, other, resumed) = load_checkpoint(tmp_path / "c.pt"), make()
    damages: list[Any] = [good | {"format": 2}, good | {"module": {}}, good | {"optimizer": None}, good | {"loss": 3}]
    damages += [{k: v for k, v in good.items() if k != key} for key in good if key != "rng"]
    damages += [good | {"engine": good["engine"] | {"steps_taken": 1}}, {}]
    before = weights(again)
    for damage in damages:
        save_checkpoint(tmp_path / "d.pt", damage)
        with pytest.raises(CheckpointError) as error:
            other.load_checkpoint(tmp_path / "d.pt")
        assert "\n" not in str(error.value)
        assert same(before, weights(again)) and resumed.steps_taken == 0
    content = (tmp_path / "c.pt").read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "d.pt").write_bytes(content[:cut])
        with pytest.raises(CheckpointError):
            other.load_checkpoint(tmp_path / "d.pt")
    with pytest.raises(CheckpointError):
        other.load_checkpoint(tmp_path / "absent.pt")
    other.load_checkpoint(tmp_path / "c.pt")
    assert resumed.steps_taken == 2


def test_steps_taken_since_cannot_be_forgotten(tmp_path: Path) -> None:
    module, engine, optimizer = make()
    train(module, optimizer, CrossEntropy(), 2)
    engine.save_checkpoint(tmp_path / "c.pt")
    train(module, optimizer, CrossEntropy(), 1)
    before = weights(module)
    with pytest.raises(CheckpointError, match="forgotten"):
        engine.load_checkpoint(tmp_path / "c.pt")
    assert same(before, weights(module)) and engine.accountant.steps == 3


def test_only_plain_data_is_saved(tmp_path: Path) -> None:
    _, engine, _ = make()
    Pair = namedtuple("Pair", "a b")
    for extra in (object(), {"x": {"y": lambda: 0}}, [Pair(1, 2)], {1, 2}):
        with pytest.raises(CheckpointError, match="plain data"):
            engine.save_checkpoint(tmp_path / "c.pt", extra=extra)
    assert not list(tmp_path.iterdir())


def test_half_a_draw_is_not_saved(tmp_path: Path) -> None:
    module, engine, optimizer = make()
    optimizer.signal_skip_step(True)
    CrossEntropy()(module(torch.rand(4, DIM)), torch.arange(4) % CLASSES).backward()
    with pytest.raises(PlanError, match="in part"):
        engine.save_checkpoint(tmp_path / "c.pt")
    optimizer.discard()
    engine.save_checkpoint(tmp_path / "c.pt")


def test_strangers_are_refused(tmp_path: Path) -> None:
    module, engine, optimizer = make()
    other, _, foreign = make()
    with pytest.raises(PlanError, match="module of make_private"):
        engine.save_checkpoint(tmp_path / "c.pt", module=other)
    with pytest.raises(PlanError, match="optimizer of make_private"):
        engine.save_checkpoint(tmp_path / "c.pt", optimizer=foreign)
    with pytest.raises(PlanError, match="before checkpoints"):
        ClipFreeEngine().save_checkpoint(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="can be written"):
        engine.save_checkpoint(tmp_path / "no" / "folder" / "c.pt")
    engine.save_checkpoint(tmp_path / "c.pt", module=module, optimizer=optimizer.original_optimizer)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, engine, optimizer = make()
    engine.save_checkpoint(tmp_path / "c.pt")
    train(module, optimizer, CrossEntropy(), 1)

    def fails(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(CheckpointError, match="disk full"):
        engine.save_checkpoint(tmp_path / "c.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    assert load_checkpoint(tmp_path / "c.pt")["engine"]["steps_taken"] == 0
