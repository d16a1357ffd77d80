# SPDX-License-Identifier: Apache-2.0
"""Logit gradients stay below their bounds, which are reached, for rare classes too."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dplip.errors import ConfigError, DataError
from dplip.lipschitz_losses import HKR, KR, Cosine, MeanAbsoluteError, OneVersusAllHinge
from dplip.losses import BoundedLoss

RARE = (0.001, 0.099, 0.9)
LOSSES: dict[str, tuple[int, Callable[[], BoundedLoss], tuple[str, ...]]] = {
    "kr": (5, KR, ("l1", "l2", "linf")),
    "kr rare": (3, lambda: KR(RARE), ("l1", "l2", "linf")),
    "kr one logit": (1, lambda: KR([0.02]), ("l1", "l2", "linf")),
    "hinge": (4, OneVersusAllHinge, ("l1", "l2", "linf")),
    "hinge rare": (3, lambda: OneVersusAllHinge(0.3, RARE), ("l1", "l2", "linf")),
    "hkr": (4, lambda: HKR(3.0), ("l1", "l2", "linf")),
    "hkr rare": (3, lambda: HKR(10.0, 0.5, RARE), ("l1", "l2", "linf")),
    "hkr one logit": (1, lambda: HKR(priors=[0.3]), ("l1", "l2", "linf")),
    "cosine": (4, Cosine, ("l2", "linf")),
    "cosine K=3": (4, lambda: Cosine(3.0), ("l2", "linf")),
    "cosine K=0.1": (7, lambda: Cosine(0.1), ("l2", "linf")),
}


def gradient(loss: BoundedLoss, logits: Tensor, targets: Tensor) -> Tensor:
    z = logits.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(z, targets), z)
    return g


def logits(classes: int) -> Tensor:
    eye = torch.eye(classes)
    blocks = [s * torch.randn(60, classes) for s in (1e-3, 0.1, 1.0, 30.0, 1e6)]
    blocks += [s * eye for s in (1.0, -1.0, 1e3, -1e3)] + [torch.zeros(2, classes), torch.full((2, classes), -9.0)]
    return torch.cat(blocks).double()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_obey_the_bounds_and_reach_them(name: str) -> None:
    classes, make, tight = LOSSES[name]
    loss, z = make(), logits(classes)
    claimed = loss.logit_gradient(classes)
    largest = dict.fromkeys(("l1", "l2", "linf"), 0.0)
    for label in range(max(2, classes)):
        g = gradient(loss, z, torch.full((len(z),), label))
        for norm, p in (("l1", 1.0), ("l2", 2.0), ("linf", math.inf)):
            largest[norm] = max(largest[norm], float(torch.linalg.vector_norm(g, p, dim=1).amax()))
    for norm, value in largest.items():
        assert value <= getattr(claimed, norm) * (1 + 1e-9), norm
    for norm in tight:
        assert largest[norm] == pytest.approx(getattr(claimed, norm), rel=1e-2)


@pytest.mark.parametrize("make", [KR, lambda: HKR(3.0), lambda: KR([0.1] * 10), lambda: HKR(3.0, 1.0, [0.1] * 10)])
def test_one_example_never_feels_the_batch(make: Callable[[], BoundedLoss]) -> None:
    """Its gradient is the same alone, and as the only one of its class among 255 others."""
    loss, z = make(), torch.randn(256, 10, dtype=torch.float64)
    y = torch.cat([torch.zeros(1), torch.randint(1, 10, (255,))]).long()
    torch.testing.assert_close(gradient(loss, z, y)[:1], gradient(loss, z[:1], y[:1]))
    crowd = gradient(loss, z, torch.randint(1, 10, (256,)).index_fill(0, torch.tensor([0]), 0))
    torch.testing.assert_close(crowd[:1], gradient(loss, z[:1], y[:1]))


def test_the_l1_bound_of_the_cosine_is_reached() -> None:
    """At ``u_y = sin t`` and the rest equal, with ``tan 2t = sqrt(C - 1)``, on the sphere of radius K."""
    classes, k = 5, 2.0
    angle = 0.5 * math.atan(math.sqrt(classes - 1))
    # (1 - s^2) + s sqrt((1 - s^2)(C - 1)) is largest at half that angle
    z = torch.full((1, classes), math.cos(angle) / math.sqrt(classes - 1), dtype=torch.float64)
    z[0, 0] = math.sin(angle)
    best = float(gradient(Cosine(k), z * k * (1 + 1e-12), torch.tensor([0])).abs().sum())
    assert best == pytest.approx(Cosine(k).logit_gradient(classes).l1, rel=1e-9)


def test_kr_is_the_difference_of_class_means() -> None:
    """With one logit and the true frequencies as priors, half the dual of a Wasserstein distance, times N."""
    z, y = torch.randn(40, 1, dtype=torch.float64), (torch.arange(40) % 4 == 0).long()
    gap = z[y == 1].mean() - z[y == 0].mean()
    torch.testing.assert_close(KR([0.25])(z, y), -0.5 * 40 * gap)


def test_hkr_is_kr_plus_hinge() -> None:
    z, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(3, (9,))
    parts = KR(RARE)(z, y) + 4 * OneVersusAllHinge(0.7, RARE)(z, y)
    torch.testing.assert_close(HKR(4.0, 0.7, RARE)(z, y), parts)


@pytest.mark.parametrize("classes", [1, 6])
def test_mean_absolute_error(classes: int) -> None:
    z = 5 * torch.randn(50, classes, dtype=torch.float64)
    t = torch.randn(50, classes, dtype=torch.float64)
    loss, claimed = MeanAbsoluteError(), MeanAbsoluteError().logit_gradient(classes)
    torch.testing.assert_close(loss(z, t), (z - t).abs().mean(1).sum())
    g = gradient(loss, z, t)
    for norm, p in (("l1", 1.0), ("l2", 2.0), ("linf", math.inf)):
        reached = float(torch.linalg.vector_norm(g, p, dim=1).amax())
        assert reached == pytest.approx(getattr(claimed, norm))


@pytest.mark.parametrize("loss", [KR(), HKR(), OneVersusAllHinge(), Cosine()])
def test_an_empty_batch_costs_nothing(loss: BoundedLoss) -> None:
    assert float(loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize(
    "make", [lambda: KR([0.0, 1.0]), lambda: KR([0.5, 0.4]), lambda: HKR(0.0), lambda: Cosine(math.inf), lambda: KR([])]
)
def test_options_are_checked(make: Callable[[], BoundedLoss]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make()


def test_inputs_are_checked() -> None:
    z = torch.zeros(2, 3)
    for targets in (torch.zeros(2), torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(DataError, match="KR: expected"):
            KR()(z, targets)
    with pytest.raises(ConfigError, match="expected 3 priors"):
        KR([0.5, 0.5])(z, torch.tensor([0, 1]))
    with pytest.raises(DataError, match="two or more classes"):
        Cosine()(torch.zeros(2, 1), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="float targets"):
        MeanAbsoluteError()(z, torch.tensor([0, 1]))
