# SPDX-License-Identifier: Apache-2.0
"""Interval heads on distance features: soundness in training and as a certificate."""

import pytest
import torch
from torch import nn

from dplip.certify import certify
from dplip.errors import ConfigError, DataError
from dplip.layers import LinfDistance, Scale
from dplip.recipes import HybridNet, IntervalHead


def hybrid(scale: float = 1.0) -> HybridNet:
    torch.manual_seed(0)
    features = nn.Sequential(LinfDistance(5, 8, bias=False), LinfDistance(8, 6))
    model = HybridNet(features, IntervalHead(6, 12, 3)).double()
    with torch.no_grad():
        model.head.out.weight.mul_(scale)
    return model


@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_worst_margins_contain_every_attack(scale: float) -> None:
    model = hybrid(scale)
    x, y, eps = torch.rand(20, 5, dtype=torch.float64), torch.randint(3, (20,)), 0.1
    worst = model.worst_margins(x, y, eps).detach()
    assert torch.equal(worst.gather(1, y[:, None]), torch.zeros(20, 1, dtype=torch.float64))
    found = torch.full_like(worst, -torch.inf)
    for target in range(3):
        moved = x.clone()
        for _ in range(30):
            moved.requires_grad_()
            z = model(moved)
            margin = z - z.gather(1, y[:, None])
            found = torch.maximum(found, margin.detach())
            (g,) = torch.autograd.grad(margin[:, target].sum(), moved)
            moved = (moved.detach() + 0.02 * g.sign()).clamp(x - eps, x + eps)
    assert bool((found <= worst + 1e-12).all())
    assert float((worst - found).max()) < 20 * abs(scale) * eps  # of the box's size, not vacuous
    torch.testing.assert_close(model.worst_margins(x, y, 0.0), model(x) - model(x).gather(1, y[:, None]))


def test_elision_is_no_wider_than_boxes_of_logits_and_exact_for_an_affine_map() -> None:
    head = IntervalHead(2, 4, 3).double()
    low, high = torch.full((1, 2), -1e-4, dtype=torch.float64), torch.full((1, 2), 1e-4, dtype=torch.float64)
    y = torch.tensor([1])
    worst = head.worst_margins(low, high, y)
    spread = torch.tanh(head.hidden.weight.abs().sum(1) * 1e-4) @ (head.out.weight - head.out.weight[1]).abs().T
    torch.testing.assert_close(worst, spread[None])
    boxes = torch.tanh(head.hidden.weight.abs().sum(1) * 1e-4) @ head.out.weight.abs().T
    assert bool((worst <= boxes + boxes[1] + 1e-15).all())


def test_certificate_by_intervals_agrees_with_training_and_survives_attack() -> None:
    model = hybrid(-2.0).eval()
    x = torch.rand(20, 5, dtype=torch.float64)
    certificate = certify(model, x, method="interval")
    assert float(certificate.radius.max()) > 0.005
    for b in range(20):
        radius = float(certificate.radius[b])
        if radius > 0:
            worst = model.worst_margins(x[b : b + 1], certificate.predicted[b : b + 1], 0.5 * radius)
            assert float(worst.detach().amax()) <= 0  # half the radius leaves room for the wider box of training
    points = x + certificate.radius[:, None] * (2 * torch.rand(200, 20, 5, dtype=torch.float64).round() - 1)
    assert torch.equal(model(points.flatten(0, 1)).argmax(1).view(200, 20), certificate.predicted.expand(200, 20))


def test_intervals_train_features_and_head() -> None:
    model = hybrid()
    model.worst_margins(torch.rand(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), 0.1).sum().backward()
    assert all(
        q.grad is not None and float(q.grad.abs().sum()) > 0
        for n, q in model.named_parameters()
        if n != "head.out.bias"
    )


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match="positive sizes"):
        IntervalHead(0, 3, 3)
    with pytest.raises(ConfigError, match="constant"):
        HybridNet(Scale(1.0), IntervalHead(2, 2, 2), 0.0)
    with pytest.raises(DataError, match="eps"):
        hybrid().worst_margins(torch.rand(1, 5, dtype=torch.float64), torch.tensor([0]), -1.0)
