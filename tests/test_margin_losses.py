# SPDX-License-Identifier: Apache-2.0
"""Margin losses: values by hand, and gradients against their proved bounds, by search."""

import math

import pytest
import torch
from torch import Tensor

from dplip.errors import ConfigError, DataError, PlanError
from dplip.losses import BoundedLoss
from dplip.margin_losses import CrossEntropyHinge, Hinge, Mixture, margins

LOSSES = {
    "hinge": Hinge(0.6),
    "hinge-mean": Hinge(0.2, 0.0),
    "hinge-max": Hinge(2.0, 1.0),
    "mixture": Mixture(0.6, 0.3),
    "mixture-wide": Mixture(0.5, 2.0, clip=3.0, temperature=1.5),
    "mixture-steep": Mixture(0.9, 1.0, clip=1.5, temperature=20.0),
    "ce-hinge": CrossEntropyHinge(0.6, 0.7),
    "ce-hinge-hot": CrossEntropyHinge(0.1, 5.0, temperature=9.0),
}
TIGHT = {"hinge", "hinge-mean", "hinge-max"}  # attained where all classes tie; the others mix terms of different points


def gradients(loss: BoundedLoss, z: Tensor, y: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    return torch.autograd.grad(loss(z, y), z)[0]


def hard_logits(classes: int, theta: float) -> tuple[Tensor, Tensor]:
    """Random logits of many scales, ties, and points just inside and outside every kink."""
    torch.manual_seed(classes)
    parts = [scale * torch.randn(300, classes, dtype=torch.float64) for scale in (1e-3, 0.1, 1.0, 10.0, 1e3)]
    parts += [torch.zeros(3, classes, dtype=torch.float64)]
    for gap in (-theta, 0.0, theta, 2 * theta, 0.5 * theta):
        for nudge in (-1e-9, 0.0, 1e-9):
            z = torch.zeros(classes + 1, classes, dtype=torch.float64)
            z[:, 0] = -gap + nudge  # class 0 is the true one below
            z[torch.arange(1, classes), torch.arange(1, classes)] += 1e-12
            parts.append(z)
    z = torch.cat(parts)
    y = torch.randint(classes, (len(z),))
    y[1503:] = 0
    return z, y


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_obey_their_bounds(name: str, classes: int) -> None:
    loss = LOSSES[name]
    z, y = hard_logits(classes, loss.theta)
    bound = loss.logit_gradient(classes)
    reached = 0.0
    for _ in range(40):  # ascent on the gradient's norm, through the smooth part
        z.requires_grad_()
        g = torch.autograd.grad(loss(z, y), z, create_graph=True)[0]
        for norm, p in ((bound.l1, 1), (bound.l2, 2), (bound.linf, math.inf)):
            assert float(g.detach().norm(p, dim=1).max()) <= norm * (1 + 1e-12)
        reached = max(reached, float(g.detach().norm(dim=1).max()) / bound.l2)
        push = torch.autograd.grad(g.square().sum(), z, allow_unused=True)[0] if g.requires_grad else None
        z = z.detach() + (0.05 * loss.theta * push.sign() if push is not None else 0.01 * torch.randn_like(z))
    if name in TIGHT:
        assert reached >= 1 - 1e-9
    assert reached >= 0.5


def test_bounds_cover_a_decaying_weight() -> None:
    loss = Mixture(0.6, 0.3)
    first = loss.logit_gradient(10)
    loss.weight = 0.003
    later = loss.logit_gradient(10)
    assert later.l1 < first.l1 and later.l2 < first.l2


def test_hinge_mixes_maximum_and_mean_over_all_classes() -> None:
    z, y = torch.tensor([[1.0, 0.8, 0.2, -3.0]]), torch.tensor([0])
    m = torch.tensor([0.0, 0.3, 0.0, 0.0])  # -0.2, -0.8, -4 plus 0.5
    torch.testing.assert_close(Hinge(0.5)(z, y), 0.75 * m.max() + 0.25 * m.mean())
    second_version_mix = 0.25
    torch.testing.assert_close(Hinge(0.5, 1 - second_version_mix)(z, y), Hinge(0.5)(z, y))


def test_mixture_saturates_and_adds_cross_entropy() -> None:
    z, y = torch.tensor([[2.0, 0.0, 1.8], [0.0, 5.0, 1.0]]), torch.tensor([0, 0])
    ce = torch.nn.functional.cross_entropy(3 * z, y, reduction="sum")
    torch.testing.assert_close(Mixture(0.4, 0.1, temperature=3.0)(z, y), 0.5 + 1.0 + 0.1 * ce)
    assert torch.equal(gradients(Mixture(0.4, 0.0), z, y)[1], torch.zeros(3))


def test_ce_hinge_counts_right_examples_only() -> None:
    z, y = torch.tensor([[2.0, 0.0, 1.8], [0.0, 5.0, 1.0]]), torch.tensor([0, 0])
    torch.testing.assert_close(CrossEntropyHinge(0.4, 0.0)(z, y), torch.tensor(0.5))


def test_margin_of_the_true_class_is_zero_and_losses_are_sums() -> None:
    z, y = torch.randn(7, 4), torch.randint(4, (7,))
    assert torch.equal(margins(z, y, 0.3).gather(1, y[:, None]), torch.zeros(7, 1))
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(z, y), sum(loss(z[i : i + 1], y[i : i + 1]) for i in range(7)))


def test_learned_temperature_stays_positive_and_has_no_bounds() -> None:
    loss = Mixture(0.6, 0.1, temperature=2.0, learn_temperature=True)
    assert loss.temperature == pytest.approx(2.0)
    with torch.no_grad():
        loss.log_temperature.fill_(-40.0)
    z, y = torch.randn(5, 3), torch.randint(3, (5,))
    assert loss.temperature > 0 and math.isfinite(float(loss(z, y).detach()))
    with pytest.raises(PlanError, match="learn_temperature=False"):
        loss.logit_gradient(3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hinge(0.0),
        lambda: Hinge(1.0, 1.1),
        lambda: Mixture(math.inf),
        lambda: Mixture(1.0, -0.1),
        lambda: Mixture(1.0, clip=0.0),
        lambda: CrossEntropyHinge(1.0, temperature=-1.0),
        lambda: setattr(Mixture(1.0), "weight", math.nan),
    ],
)
def test_arguments_out_of_range(make: object) -> None:
    with pytest.raises(ConfigError):
        make()


def test_wrong_labels_are_refused() -> None:
    with pytest.raises(DataError, match="class indices"):
        Hinge(1.0)(torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(DataError, match="C >= 2"):
        Hinge(1.0)(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
