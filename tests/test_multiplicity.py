# SPDX-License-Identifier: Apache-2.0
"""K copies of an example move the gradient no further than one."""

import math

import pytest
import torch

from dplip.errors import BoundViolation, ConfigError, DataError
from dplip.losses import BoundedLoss, CrossEntropy, LogitGradientClip, MulticlassMargin
from dplip.multiplicity import AugmentationMultiplicity, augmented
from dplip.privacy import AdaptiveLogitClip, StepSensitivity
from tests.privacy.toy import CLASSES, DIM, DOMAIN, attach, net

K = 4


def step_gradient(model, loss, x, y):
    model.zero_grad()
    loss(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "inner", [CrossEntropy(8.0), MulticlassMargin(30.0), LogitGradientClip(CrossEntropy(8.0), 0.3, "l1")]
)
def test_the_copies_of_one_example_stay_within_one_copys_bound(inner: BoundedLoss) -> None:
    """Also when all copies agree, the worst case: then the bound of a single copy is used up."""
    model = net().double()
    loss = AugmentationMultiplicity(inner, K)
    bounds = StepSensitivity(model, DOMAIN, loss).tensors()
    single = StepSensitivity(model, DOMAIN, inner).tensors()
    assert {n: t.bound for n, t in bounds.items()} == {n: t.bound for n, t in single.items()}
    worst = dict.fromkeys(bounds, 0.0)
    for trial in range(60):
        x = torch.rand(1, DIM, dtype=torch.float64)
        x = x.expand(K, DIM) if trial % 2 else torch.rand(K, DIM, dtype=torch.float64).round()
        for name, g in step_gradient(model, loss, x, torch.tensor([trial % CLASSES])).items():
            worst[name] = max(worst[name], float(g.norm()))
    assert all(worst[name] <= bounds[name].bound for name in worst)
    assert max(worst[name] / bounds[name].bound for name in worst) > 0.5


@pytest.mark.parametrize(
    ("outer", "inside"), [(LogitGradientClip, True), (LogitGradientClip, False), (AdaptiveLogitClip, False)]
)
def test_clipping_composes_in_either_order(outer: type, inside: bool) -> None:
    """An example's rows together never exceed the clip: a clip of each row alone would let through K times as much."""
    base = CrossEntropy(50.0)
    loss = AugmentationMultiplicity(outer(base, 0.2), K) if inside else outer(AugmentationMultiplicity(base, K), 0.2)
    z = (5 * torch.randn(20 * K, 3, dtype=torch.float64)).requires_grad_()
    (g,) = torch.autograd.grad(loss(z, torch.randint(3, (20,))), z)
    per_example = g.view(20, K, 3)
    assert float(per_example.norm(dim=2).sum(1).amax()) == pytest.approx(loss.logit_gradient(3).l2)


def test_the_value_is_the_mean_over_copies() -> None:
    z, y = torch.randn(6, 3), torch.tensor([0, 2])
    means = [CrossEntropy()(z[3 * i : 3 * i + 3], y[i].repeat(3)) / 3 for i in range(2)]
    torch.testing.assert_close(AugmentationMultiplicity(CrossEntropy(), 3)(z, y), sum(means))


def test_nested_copies_multiply() -> None:
    loss = AugmentationMultiplicity(AugmentationMultiplicity(CrossEntropy(), 2), 3)
    assert loss.copies == 6
    z, y = torch.randn(12, 3), torch.tensor([0, 2])
    torch.testing.assert_close(loss(z, y), AugmentationMultiplicity(CrossEntropy(), 6)(z, y))


def test_a_private_step_accepts_the_copies() -> None:
    model, loss = net(), AugmentationMultiplicity(CrossEntropy(), K)
    engine, optimizer = attach(model, loss=loss)
    x, y = torch.rand(5, DIM), torch.randint(CLASSES, (5,))
    optimizer.zero_grad()
    rows = augmented(x, K, lambda t: (t + 0.1 * torch.rand_like(t)).clamp(0, 1))
    loss(model(rows), y).backward()
    optimizer.step()
    assert optimizer.steps_taken == 1 and engine.get_epsilon() > 0


def test_copies_that_are_summed_are_caught() -> None:
    """The inner loss on the K rows, without the average, would multiply the sensitivity by K."""
    model = net()
    _, optimizer = attach(model, loss=AugmentationMultiplicity(CrossEntropy(), K))
    optimizer.zero_grad()
    y = torch.zeros(5 * K, dtype=torch.int64)
    with pytest.raises(BoundViolation, match="logit gradient"):
        CrossEntropy(8.0)(model(torch.rand(5 * K, DIM)), y).backward()


def test_copies_of_an_example_are_adjacent() -> None:
    made = augmented(torch.tensor([[1.0], [2.0]]), 3, lambda t: t + 0.0)
    assert made.flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert augmented(torch.zeros(0, 2), 3, lambda t: t).shape == (0, 2)


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="copies >= 1"):
        AugmentationMultiplicity(CrossEntropy(), 0)
    with pytest.raises(ConfigError, match="copies >= 1"):
        augmented(torch.zeros(1, 1), 0, lambda t: t)
    with pytest.raises(DataError, match="rows per example"):
        AugmentationMultiplicity(CrossEntropy(), 2)(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="another number"):
        augmented(torch.zeros(4, 1), 2, lambda t: t[:2])
    assert math.isfinite(AugmentationMultiplicity(CrossEntropy(), 2).logit_gradient(3).l1)
