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
from torch.optim import SGD

from dplip.checkpoint import load_checkpoint, save_checkpoint
from dplip.errors import RankError
from dplip.privacy import DistributedClipFreeEngine
from dplip.privacy.noise import NoiseSource
from tests.privacy.ranks import Died, run, values
from tests.privacy.test_distributed import dataset, laid_out, mixed_net
from tests.privacy.test_distributed_failures import LOSS
from tests.privacy.toy import DOMAIN, plan

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
        state = load_checkpoint(path)
        engine.load_state_dict(state["engine"])
        module.load_state_dict(state["model"])
    victim, at, moment = kill or (-1, -1, "")
    while optimizer.steps_taken < STEPS:
        due = rank == victim and optimizer.steps_taken >= at
        if due and moment == "between steps":
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = loader.batch(loader.sampler.draw())
        optimizer.zero_grad()
        LOSS(module(x), y).backward()
        if due and moment == "before the noise leaves":
            engine.ranks.broadcast_ = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
        optimizer.step()
        if optimizer.steps_taken % EVERY == 0 or optimizer.steps_taken == STEPS:
            if due and moment == "while saving":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 0:
                save_checkpoint(path, {"engine": engine.state_dict(), "model": module.state_dict()})
            engine.ranks.gather([0.0])  # nobody goes on, and shows anything, before it is on disk
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
