# SPDX-License-Identifier: Apache-2.0
"""The clip quantile is released inside the step's budget, and the noise follows the clip."""

import math

import pytest
import torch

from accountants import Gaussian
from dplip.errors import BoundViolation, ConfigError, PlanError
from dplip.losses import CrossEntropy, LogitGradientClip
from dplip.multiplicity import AugmentationMultiplicity
from dplip.privacy import AdaptiveLogitClip, NoiseSource
from tests.privacy.toy import CLASSES, DIM, attach, net, plan


def one_step(model, optimizer, loss, n=20):
    optimizer.zero_grad()
    loss(model(torch.rand(n, DIM)), torch.randint(CLASSES, (n,))).backward()
    optimizer.step()


def test_the_two_releases_are_one_mechanism_of_the_plans_multiplier() -> None:
    loss = AdaptiveLogitClip(CrossEntropy(), 1.0, noise_multiplier=5.0)
    z = loss.gradient_multiplier(1.3, 0)
    assert z > 1.3
    assert Gaussian.joint(z, 5.0).noise_multiplier == pytest.approx(1.3)


@pytest.mark.parametrize("every", [1, 3])
def test_the_ledger_is_the_plans_however_often_the_bound_is_refreshed(every: int) -> None:
    """Ten steps refresh at 0, 3, 6, 9: four times, ceil(10 / 3), and the planned epsilon is the spent one."""
    model, loss = net(), AdaptiveLogitClip(CrossEntropy(), 0.5, noise_multiplier=4.0, every=every)
    engine, optimizer = attach(model, loss=loss)
    for _ in range(10):
        one_step(model, optimizer, loss)
    assert loss.refreshes == math.ceil(10 / every)
    assert engine.get_epsilon() == pytest.approx(plan().epsilon(), rel=1e-12)
    assert engine.accountant.steps == 10


def test_refresh_steps_add_noise_to_the_gradient_and_others_do_not() -> None:
    loss = AdaptiveLogitClip(CrossEntropy(), 0.5, noise_multiplier=2.0, every=2)
    sigma = []
    for steps in range(2):
        _, optimizer = attach(net(), loss=loss)
        optimizer.steps_taken = steps
        bounds = optimizer.tensors()
        spent = sum((t.bound / s) ** 2 for t, s in bounds.values())
        sigma.append(spent**-0.5)
    assert sigma == pytest.approx([1 / math.sqrt(1 - 1 / 4), 1.0])


def test_noise_follows_the_clip() -> None:
    """A clip of 0.1 buys a tenth of the noise of a clip of 1, for the last layer exactly."""
    noise = []
    for bound in (1.0, 0.1):
        _, optimizer = attach(net(), loss=AdaptiveLogitClip(CrossEntropy(), bound), allocation="global")
        noise.append(next(iter(optimizer.tensors().values()))[1])
    assert noise[1] == pytest.approx(noise[0] / 10)


def test_the_statistic_has_the_claimed_sensitivity_and_noise() -> None:
    """Without noise, one example moves the centred sum by exactly 1/2; with it, the spread is z_b / 2."""
    loss = AdaptiveLogitClip(CrossEntropy(), 1.0, noise_multiplier=6.0, rate=1.0, least=1e-9, most=1e9)

    def statistic(within: int, rows: int, private: bool, noise: NoiseSource) -> float:
        loss._bound.fill_(1.0)
        loss.observe(within, rows)
        loss.release(0, 1000.0, noise, private)
        return (-math.log(loss.bound) + loss.quantile - 0.5) * 1000.0

    source = NoiseSource(insecure_seed=3)
    base = statistic(7, 11, False, source)
    for within, rows in ((8, 12), (7, 12), (7, 10), (6, 10)):  # add or remove one, inside the bound or outside
        assert abs(statistic(within, rows, False, source) - base) == pytest.approx(0.5)
    draws = torch.tensor([statistic(7, 11, True, source) - base for _ in range(4000)])
    assert float(draws.std()) == pytest.approx(3.0, rel=0.05)


def test_the_bound_finds_the_quantile() -> None:
    """Nine of ten gradients have norm 0.5, one has 2: the 0.7 quantile is 0.5."""
    loss = AdaptiveLogitClip(LogitGradientClip(CrossEntropy(), 10.0), 8.0, quantile=0.7, rate=0.3, noise_multiplier=1.0)
    source, norms = NoiseSource(insecure_seed=1), torch.cat([torch.full((900,), 0.5), torch.full((100,), 2.0)])
    for step in range(200):
        loss.observe(int((norms <= loss.bound).sum()), len(norms))
        loss.release(step, 1000.0, source)
    assert 0.4 < loss.bound < 0.65


def test_gradients_are_clipped_at_the_bound_of_the_step() -> None:
    loss = AdaptiveLogitClip(CrossEntropy(30.0), 0.25, norm="l1")
    z = (3 * torch.randn(40, 5)).requires_grad_()
    (g,) = torch.autograd.grad(loss(z, torch.randint(5, (40,))), z)
    assert float(g.abs().sum(1).amax()) == pytest.approx(0.25, rel=1e-5)
    assert loss.logit_gradient(5).l1 == pytest.approx(0.25)


def test_the_guard_follows_the_bound() -> None:
    model, loss = net(), AdaptiveLogitClip(CrossEntropy(), 1.0, rate=3.0, noise_multiplier=50.0)
    _, optimizer = attach(model, loss=loss, noise_multiplier=0.5)
    for _ in range(3):
        one_step(model, optimizer, loss)
        assert optimizer.guard.cotangent.l2 == pytest.approx(loss.logit_gradient(CLASSES).l2)
    stale = LogitGradientClip(CrossEntropy(50.0), 1.5)
    loss._bound.fill_(0.01)
    optimizer.guard.cotangent = optimizer.sensitivity.refresh_cotangent()
    with pytest.raises(BoundViolation):
        stale(model(torch.rand(5, DIM)), torch.zeros(5, dtype=torch.int64)).backward()


def test_empty_batches_still_release() -> None:
    model, loss = net(), AdaptiveLogitClip(CrossEntropy(), 1.0)
    engine, optimizer = attach(model, loss=loss)
    one_step(model, optimizer, loss, n=0)
    optimizer.zero_grad()
    optimizer.step()
    assert loss.refreshes == 2 and engine.accountant.steps == 2


def test_two_backward_passes_are_refused_and_dropped_ones_are_not_counted() -> None:
    model, loss = net(), AdaptiveLogitClip(CrossEntropy(), 1.0)
    _, optimizer = attach(model, loss=loss)
    x, y = torch.rand(4, DIM), torch.zeros(4, dtype=torch.int64)
    loss(model(x), y).backward()
    optimizer.zero_grad()
    loss(model(x), y).backward()
    with pytest.raises(PlanError, match="one backward pass"):
        loss(model(x), y).backward()


def test_a_quantile_that_overspends_is_refused_before_anything_is_spent() -> None:
    with pytest.raises(PlanError, match="overspend"):
        attach(net(), loss=AdaptiveLogitClip(CrossEntropy(), 1.0, noise_multiplier=0.9))
    with pytest.raises(PlanError, match="outermost"):
        attach(net(), loss=AugmentationMultiplicity(AdaptiveLogitClip(CrossEntropy(), 1.0), 2))


@pytest.mark.parametrize(
    "change", [{"bound": 0.0}, {"quantile": 1.0}, {"norm": "l7"}, {"every": 0}, {"rate": math.inf}]
)
def test_options_are_checked(change) -> None:
    with pytest.raises(ConfigError, match="AdaptiveLogitClip: expected"):
        AdaptiveLogitClip(CrossEntropy(), **({"bound": 1.0} | change))
