# SPDX-License-Identifier: Apache-2.0
"""Random loops, right and wrong: whatever is released, no example is in it more than once.

The model adds a bias and the loss is linear, so that one entry of the bias's gradient counts one example's
contributions. Without noise, what a step releases is that count over the divisor.
"""

import contextlib
import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from dplip.bounds import InputDomain
from dplip.errors import DplipError
from dplip.layers import PositionBias
from dplip.losses import BoundedLoss
from dplip.norms import Norms
from dplip.privacy import ClipFreeEngine, ClipFreeOptimizer, PrivacyPlan, virtual_batches

EXAMPLES = 12


class Count(BoundedLoss):
    """``sum_b z_b[y_b]``: the gradient of example ``b`` is the unit vector of its number."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.gather(1, targets[:, None]).sum()

    def logit_gradient(self, num_classes: int) -> Norms:
        return Norms(num_classes, l1=1.0, l2=1.0, linf=1.0)


class Run:
    """One run and what its steps released."""

    def __init__(self, steps: int = 10_000) -> None:
        settings = PrivacyPlan(population=EXAMPLES, sampling_prob=1.0, steps=steps, delta=1e-5, noise_multiplier=0.0)
        self.module = nn.Sequential(PositionBias(EXAMPLES))
        self.x, self.y = torch.zeros(EXAMPLES, EXAMPLES), torch.arange(EXAMPLES)
        self.engine = ClipFreeEngine(insecure_seed=0)
        _, self.optimizer, self.loader = self.engine.attach(
            self.module,
            SGD(self.module.parameters(), 0.0),
            TensorDataset(self.x, self.y),
            Count(),
            settings,
            InputDomain((EXAMPLES,), -1.0, 1.0),
        )
        self.released: list[list[int]] = []
        self.optimizer.attach_step_hook(self._note)

    def _note(self, optimizer: ClipFreeOptimizer) -> None:
        grad = self.module[0].bias.grad
        if grad is not None:  # else it was frozen, and nothing was released
            self.released.append([round(float(c)) for c in grad * optimizer.expected_batch_size])

    def backward(self, rows: Tensor, retain: bool = False) -> Tensor:
        loss: Tensor = Count()(self.module(self.x[rows]), self.y[rows])
        loss.backward(retain_graph=retain)
        return loss


def misuse(run: Run, rng: random.Random) -> None:
    """A random sequence of calls on the parts of fresh draws; every refusal is survived and the loop goes on."""
    cut = rng.randrange(1, EXAMPLES + 1)
    parts = list(torch.randperm(EXAMPLES).split(cut))
    kept: list[Tensor] = []
    optimizer, turn = run.optimizer, 0

    def part() -> Tensor:
        nonlocal turn
        rows = parts[turn % len(parts)]
        optimizer.signal_skip_step(turn % len(parts) < len(parts) - 1, rows=len(rows))
        turn += 1
        return rows

    def again() -> None:
        run.backward(parts[(turn - 1) % len(parts)])

    def whole() -> None:
        run.backward(torch.arange(EXAMPLES))

    def keep() -> None:
        kept.append(run.backward(parts[(turn - 1) % len(parts)], retain=True))

    def replay() -> None:
        if kept:
            rng.choice(kept).backward(retain_graph=True)

    def evaluation() -> None:
        run.module.eval()
        try:
            run.backward(torch.arange(EXAMPLES))
        finally:
            run.module.train()

    calls: list[Callable[[], object]] = [
        lambda: run.backward(part()),
        lambda: run.backward(part()),
        part,
        again,
        keep,
        replay,
        whole,
        evaluation,
        optimizer.step,
        optimizer.step,
        optimizer.zero_grad,
        optimizer.zero_grad,
        lambda: optimizer.zero_grad(set_to_none=False),
        optimizer.discard,
        lambda: run.module[0].bias.requires_grad_(rng.random() < 0.8),
    ]
    for _ in range(30):
        # RuntimeError: torch itself refuses a backward pass without a graph
        with contextlib.suppress(DplipError, RuntimeError):
            rng.choice(calls)()
    run.module[0].bias.requires_grad_(True)


def test_no_example_is_released_twice_however_the_loop_goes_wrong() -> None:
    rng, run = random.Random(0), Run()
    for seed in range(400):
        torch.manual_seed(seed)
        misuse(run, rng)
        run.optimizer.discard()
    counts = list(itertools.chain(*run.released))
    assert len(run.released) > 300 and sum(counts) > 300  # the attack does get through to releases
    assert max(counts) == 1 and min(counts) == 0


@pytest.mark.parametrize("guarded", ["parts", "arrivals"])
def test_the_attack_succeeds_without_the_guard(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above is able to fail: with the guard's verdict taken away, examples do count twice."""
    rng, run = random.Random(0), Run()
    guard = run.optimizer.guard
    if guarded == "parts":
        monkeypatch.setattr(guard, "require_one_backward", lambda: None)
    else:
        monkeypatch.setattr(guard, "_arrived", lambda p: None)
        for p in run.module.parameters():
            p._post_accumulate_grad_hooks.clear()
    for seed in range(100):
        torch.manual_seed(seed)
        misuse(run, rng)
        run.optimizer.discard()
    assert max(itertools.chain(*run.released)) > 1


def test_the_right_loop_releases_every_example_once() -> None:
    run = Run()
    for size in range(1, EXAMPLES + 1):
        with virtual_batches(run.loader, run.optimizer, size) as batches:
            for x, y in batches:
                run.optimizer.zero_grad()
                Count()(run.module(x), y).backward()
                run.optimizer.step()
    assert run.released == [[1] * EXAMPLES] * EXAMPLES
