# SPDX-License-Identifier: Apache-2.0
"""The gradient-to-noise reading is right on average and uses released values only."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from dplip.layers import NormalizedLinear
from dplip.losses import CrossEntropy
from dplip.privacy import GradientToNoise
from tests.privacy.toy import CLASSES, DIM, attach

BATCH = 400


def test_the_reading_is_the_signals_norm() -> None:
    """A frozen model sees the same batch again and again: its gradient is known."""
    torch.manual_seed(0)
    model = nn.Sequential(NormalizedLinear(DIM, CLASSES))
    _, optimizer = attach(model, optimizer=SGD(model.parameters(), 1e-12), steps=300, population=2000)
    watch = GradientToNoise(optimizer, decay=0.99)
    x, y = torch.rand(BATCH, DIM), torch.zeros(BATCH, dtype=torch.int64)
    for _ in range(300):
        optimizer.zero_grad()
        loss = CrossEntropy()(model(x), y)
        loss.backward()
        true = {n: float(p.grad.norm()) / optimizer.expected_batch_size for n, p in model.named_parameters()}
        optimizer.step()
    for name, reading in watch.tensors().items():
        size = dict(model.named_parameters())[name].numel()
        assert reading.noise == pytest.approx(
            optimizer.released_sigma[name] * size**0.5 / optimizer.expected_batch_size
        )
        assert reading.signal == pytest.approx(true[name], rel=0.05)
        assert reading.ratio == pytest.approx(reading.signal / reading.noise)


def test_pure_noise_reads_as_no_signal() -> None:
    model = nn.Sequential(NormalizedLinear(DIM, CLASSES))
    _, optimizer = attach(model, steps=200)
    watch = GradientToNoise(optimizer, decay=0.99)
    assert watch.tensors() == {}
    for _ in range(200):
        optimizer.zero_grad()
        optimizer.step()
    assert all(ratio < 0.5 for ratio in watch.metrics().values())
    assert set(watch.metrics()) == {f"gradient_to_noise/{n}" for n, _ in model.named_parameters()}


def test_without_noise_all_is_signal() -> None:
    model = nn.Sequential(NormalizedLinear(DIM, CLASSES))
    _, optimizer = attach(model, noise_multiplier=0.0)
    watch = GradientToNoise(optimizer)
    optimizer.zero_grad()
    CrossEntropy()(model(torch.rand(4, DIM)), torch.zeros(4, dtype=torch.int64)).backward()
    optimizer.step()
    reading = watch.tensors()["0.weight"]
    assert reading.signal == pytest.approx(reading.released) and reading.ratio == float("inf")
