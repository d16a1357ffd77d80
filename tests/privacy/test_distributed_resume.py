# SPDX-License-Identifier: Apache-2.0
"""Ranks killed at random moments: the ledger of the finished run is its steps, and no noise was drawn twice."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam

from dplip.checkpoint import load_checkpoint
from dplip.errors import CheckpointError, RankError
from dplip.privacy import ClipFreeEngine, DistributedClipFreeEngine
from dplip.privacy.noise import NoiseSource
from tests.privacy.ranks import Died, run, values
from tests.privacy.test_distributed import assert_close, dataset, laid_out, mixed_net, whole_weights
from tests.privacy.test_distributed_failures import LOSS
from tests.privacy.toy import DOMAIN, plan, weights

STEPS, EVERY = 72, 3
MOMENTS = ("between steps", "before the noise leaves", "while saving")
SETTINGS = plan(steps=STEPS, sampling_prob=0.3, population=41)


def log_noise(path: Path) -> None:
    """From now on the first number of every block drawn is written to ``path`` as exact hexadecimal."""
    plain = NoiseSource._draw

    def logged(self: NoiseSource, n: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        for offset, block in plain(self, n, device):
            with path.open("a") as file:
                file.write(float(block[0]).hex() + "\n")
            yield offset, block

    NoiseSource._draw = logged  # type: ignore[method-assign]


def life(rank: int, folder: Path, layout: str, number: int, kill: tuple[int, int, str] | None) -> tuple[int, int]:
    """Train from the last checkpoint; rank ``kill[0]`` is killed after ``kill[1]`` steps."""
    log_noise(folder / f"noise-{number}-{rank}")
    module = laid_out(mixed_net(), layout)
    engine = DistributedClipFreeEngine()
    _, optimizer, loader = engine.attach(module, SGD(module.parameters(), 0.1), dataset(), LOSS, SETTINGS, DOMAIN)
    path = folder / "checkpoint.pt"
    if path.exists():
        engine.load_checkpoint(path)
    victim, at, moment = kill or (-1, -1, "")
    while optimizer.steps_taken < STEPS:
        due = rank == victim and optimizer.steps_taken >= at
        if due and moment == "between steps":
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = loader.batch(loader.sampler.draw())
        optimizer.zero_grad()
        LOSS(module(x), y).backward()
        if due and moment == "before the noise leaves":
            engine.ranks.broadcast_ = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        if optimizer.steps_taken % EVERY == 0 or optimizer.steps_taken == STEPS:
            if due and moment == "while saving":
                os.kill(os.getpid(), signal.SIGKILL)
            engine.save_checkpoint(path)
    return optimizer.steps_taken, sum(count for _, count in engine.accountant.ledger)


def saved_steps(folder: Path) -> int:
    path = folder / "checkpoint.pt"
    return load_checkpoint(path)["engine"]["steps_taken"] if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "ddp"])
def test_killed_ten_times_the_ledger_is_the_steps_and_no_noise_repeats(tmp_path: Path, layout: str) -> None:
    dice = random.Random(layout)
    kills = 10 if layout == "plain" else 2
    for number in range(kills):
        kill = (dice.randrange(2), saved_steps(tmp_path) + EVERY + dice.randrange(4), MOMENTS[number % 3])
        answers = run(life, tmp_path, layout, number, kill)
        victim, survivor = answers[kill[0]], answers[1 - kill[0]]
        assert isinstance(victim, Died) and victim.args == (-signal.SIGKILL,)
        assert isinstance(survivor, (RankError, RuntimeError)), survivor
        assert saved_steps(tmp_path) % EVERY == 0
    assert 0 < saved_steps(tmp_path) < STEPS
    assert values(life, tmp_path, layout, kills, None) == [(STEPS, STEPS)] * 2
    noise = [line for path in tmp_path.glob("noise-*") for line in path.read_text().split()]
    assert len(noise) >= STEPS and len(noise) == len(set(noise))


WHOLE = plan(noise_multiplier=0.0, sampling_prob=1.0, population=41)


def steps_of(engine: ClipFreeEngine, layout: str, count: int, path: Path) -> dict[str, Tensor]:
    """``count`` noise-free steps on all examples, from the checkpoint if there is one."""
    module = laid_out(mixed_net(), layout)
    _, private, loader = engine.attach(module, Adam(module.parameters(), 0.05), dataset(), LOSS, WHOLE, DOMAIN)
    if path.exists():
        assert engine.load_checkpoint(path, module=module) == {"note": [1, 2.5]}
    for _ in range(count):
        x, y = loader.batch(loader.sampler.draw())
        private.zero_grad()
        LOSS(module(x), y).backward()
        private.step()
    if not path.exists():
        engine.save_checkpoint(path, module=module, extra={"note": [1, 2.5]})
    return whole_weights(module)


def across_layouts(rank: int, path: Path) -> list[dict[str, Tensor]]:
    steps_of(DistributedClipFreeEngine(), "fsdp2", 3, path)
    return [steps_of(DistributedClipFreeEngine(), layout, 2, path) for layout in ("fsdp2", "plain", "ddp")]


def test_a_sharded_run_goes_on_in_any_layout_and_in_one_process(tmp_path: Path) -> None:
    first, second = values(across_layouts, tmp_path / "checkpoint.pt")
    alone = steps_of(ClipFreeEngine(), "plain", 2, tmp_path / "checkpoint.pt")
    straight = steps_of(ClipFreeEngine(), "plain", 5, tmp_path / "other.pt")
    for found in (*first, *second, alone):
        assert_close(found, straight)


def one_cannot_read(rank: int, folder: Path) -> None:
    steps_of(DistributedClipFreeEngine(), "plain", 1, folder / "checkpoint.pt")
    module = mixed_net()
    engine = DistributedClipFreeEngine()
    engine.attach(module, SGD(module.parameters(), 0.05), dataset(), LOSS, WHOLE, DOMAIN)
    before = weights(module)
    try:
        engine.load_checkpoint(folder / "checkpoint.pt" if rank == 0 else folder / "absent.pt")
    finally:
        assert rank == 0 or all(torch.equal(before[n], w) for n, w in weights(module).items())


def test_a_checkpoint_that_one_rank_cannot_read_is_loaded_by_none(tmp_path: Path) -> None:
    first, second = run(one_cannot_read, tmp_path)
    assert isinstance(first, RankError) and "absent.pt" in str(first)
    assert isinstance(second, CheckpointError)
