# SPDX-License-Identifier: Apache-2.0
"""The audit on trial: it stays inside the ball, reaches what can be reached, and catches every planted bug."""

import copy
import math

import pytest
import torch
from torch import nn

from dplip.audit.robustness import attack, flips, lipschitz_lower_bound, smooth_relative
from dplip.bounds import lipschitz, trace
from dplip.bounds import unit_radii as true_radii
from dplip.bounds.operations import Add
from dplip.certify import Certificate, certify
from dplip.certify.interval import IntervalCertifier
from dplip.errors import ConfigError
from dplip.layers import Abs, LinfDistance, MaxMin, NormalizedLinear, ReferenceShift, Scale, SortLinear
from tests.certify.zoo import C, D, build, inputs


def linear():
    return nn.Sequential(nn.Linear(5, 3)).eval()


@pytest.mark.parametrize("domain", [None, (0.0, 1.0)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stays_in_the_ball_and_the_domain(norm, domain):
    model, x = build("relu"), torch.rand(16, D)
    radius = torch.linspace(0.0, 1.0, 16, dtype=torch.float64)
    c = certify(model, x)
    found = attack(model, x, c.predicted, radius, norm, domain=domain, restarts=4, steps=10)
    move = (found.adversarial.double() - x.double()).flatten(1)
    size = move.abs().amax(1) if norm == "linf" else move.norm(dim=1)
    assert bool((size <= radius).all())
    if domain is not None:
        assert bool(((found.adversarial >= 0) & (found.adversarial <= 1)).all())
    with torch.no_grad():
        assert torch.equal(found.flipped, (model(found.adversarial).argmax(1) != c.predicted) & (radius > 0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_flips_a_linear_model_just_beyond_its_radius_and_not_within(norm):
    model, x = linear(), torch.randn(40, 5)
    c = certify(model, x, norm)
    assert flips(model, x, c) == 0
    for factor, expected in ((0.99, 0.0), (1.01, 1.0)):
        found = attack(model, x, c.predicted, c.radius * factor, norm)
        assert float(found.flipped.double().mean()) == expected


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["linf", "sort"])
def test_reaches_what_exhaustive_search_reaches_on_sparse_gradients(name, norm):
    model, x = build(name), torch.rand(10, D)
    c = certify(model, x, norm)
    noise = 2 * torch.rand(4000, D) - 1
    noise = torch.cat([noise, noise.sign()[:64]])
    if norm == "l2":
        noise = noise / noise.norm(dim=1, keepdim=True).clamp_min(1.0)
    flippable = torch.zeros(10, dtype=torch.bool)
    for factor in (3.0, 10.0):
        radius = factor * c.radius
        with torch.no_grad():
            points = x[:, None] + 0.999 * radius.float()[:, None, None] * noise
            flippable = (model(points.reshape(-1, D)).view(10, -1, C).argmax(2) != c.predicted[:, None]).any(1)
        found = attack(model, x, c.predicted, radius, norm, restarts=16, steps=20)
        assert int((flippable & ~found.flipped).sum()) <= 1
    assert int(flippable.sum()) >= 5


def test_is_reproducible_and_leaves_the_model_alone():
    model, x = build("sort"), inputs()
    before = copy.deepcopy(model.state_dict())
    radius = torch.full((len(x),), 0.1, dtype=torch.float64)
    predicted = certify(model, x).predicted
    runs = [attack(model, x, predicted, radius, restarts=3, steps=5, seed=s) for s in (1, 1, 2)]
    assert torch.equal(runs[0].adversarial, runs[1].adversarial)
    assert not torch.equal(runs[0].adversarial, runs[2].adversarial)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_refuses_arguments_and_accepts_nothing_to_attack():
    model, x = build("relu"), inputs()
    c = certify(model, x)
    with pytest.raises(ConfigError, match="norm"):
        attack(model, x, c.predicted, c.radius, "l1")
    with pytest.raises(ConfigError, match="norm"):
        lipschitz_lower_bound(model, (D,), "l1")
    with pytest.raises(ConfigError, match="fraction"):
        flips(model, x, c, fraction=1.0)
    with pytest.raises(ConfigError, match="certified batch"):
        flips(model, x[:2], c)
    none = Certificate(c.predicted, torch.zeros_like(c.radius), "linf", "none")
    assert flips(model, x, none) == 0
    empty = attack(model, x[:0], c.predicted[:0], c.radius[:0])
    assert empty.flipped.shape == (0,)


def test_a_false_claim_is_counted():
    model, x = linear(), torch.randn(40, 5)
    c = certify(model, x)
    doubled = Certificate(c.predicted, 2 * c.radius, c.norm, c.method)
    assert flips(model, x, doubled) == int((c.radius > 0).sum())
    wrong = Certificate((c.predicted + 1) % 3, c.radius, c.norm, c.method)
    assert flips(model, x, wrong, restarts=1, steps=1) == int((c.radius > 0).sum())


def test_the_smooth_relative_has_dense_gradients_and_close_values():
    model = nn.Sequential(
        ReferenceShift(LinfDistance(D, 6), 0.5), nn.Sequential(SortLinear.geometric(6, C, 0.2)), Scale(-1.0)
    ).eval()
    relative = smooth_relative(model, p=200.0)
    x = torch.rand(9, D, requires_grad=True)
    assert not any(isinstance(m, SortLinear) for m in relative.modules()) and isinstance(model[1][0], SortLinear)
    assert math.isinf(model[0].layer.p)
    assert not any(m.training for m in relative.modules())
    one = nn.Sequential(LinfDistance(D, C)).eval()
    torch.testing.assert_close(smooth_relative(one, p=400.0)(x), one(x), rtol=0.02, atol=0.02)
    dense = torch.autograd.grad(smooth_relative(one, p=3.0)(x).sum(), x)[0]
    assert bool((dense != 0).all())
    assert isinstance(smooth_relative(SortLinear.top_k_mean(D, C, 2)), LinfDistance)


# Planted bugs: with each of them in place, the audit must find an example that flips or a constant that is beaten.


def halved(graph, values, norm):
    return {name: radius * 0.5 for name, radius in true_radii(graph, values, norm).items()}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_catches_halved_constants(norm, monkeypatch):
    model, x = nn.Sequential(NormalizedLinear(D, D), Scale(2.0), NormalizedLinear(D, C)).eval(), torch.randn(20, D)
    assert flips(model, x, certify(model, x, norm, method="margin")) == 0
    monkeypatch.setattr("dplip.certify.margin.unit_radii", halved)
    assert flips(model, x, certify(model, x, norm, method="margin")) > 0


def test_catches_an_interval_rule_without_its_absolute_value(monkeypatch):
    def signed(self, lower, upper):
        centre, half = self((lower + upper) / 2), (upper - lower) / 2 @ self.weight.T
        return centre - half.abs(), centre + half.abs()

    model = nn.Sequential(NormalizedLinear(D, 6), MaxMin(), NormalizedLinear(6, 6), MaxMin(), nn.Linear(6, C)).eval()
    x = torch.randn(30, D)
    assert flips(model, x, certify(model, x, method="interval")) == 0
    monkeypatch.setattr(NormalizedLinear, "interval", signed)
    assert flips(model, x, certify(model, x, method="interval")) > 0


def test_catches_an_interval_rule_that_forgets_a_fold(monkeypatch):
    model, x = nn.Sequential(nn.Linear(D, 6), Abs(), nn.Linear(6, C)).eval(), torch.randn(40, D)
    assert flips(model, x, certify(model, x, method="interval")) == 0
    monkeypatch.setattr(Abs, "interval", lambda self, lower, upper: (lower.abs(), lower.abs()))
    assert flips(model, x, certify(model, x, method="interval")) > 0


def test_catches_a_branch_that_is_subtracted_the_wrong_way(monkeypatch):
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(D, C), nn.Linear(D, C)

        def forward(self, x):
            return self.left(x) - self.right(x)

    def added(self, *boxes):
        return boxes[0][0] - boxes[1][0], boxes[0][1] - boxes[1][1]

    model, x = Difference().eval(), torch.randn(30, D)
    assert flips(model, x, certify(model, x, method="interval")) == 0
    monkeypatch.setattr(Add, "interval", added)
    assert flips(model, x, certify(model, x, method="interval")) > 0


def test_catches_boxes_that_forget_the_radius(monkeypatch):
    model, x = build("relu"), torch.rand(20, D)
    monkeypatch.setattr(IntervalCertifier, "_input_box", lambda self, x, eps: (x, x))
    assert flips(model, x, certify(model, x)) > 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_catches_pair_constants_of_the_wrong_norm(norm, monkeypatch):
    from dplip.certify.head import AffineHead

    model, x = linear(), torch.randn(30, 5)

    def largest_entry(self, reach):
        return torch.cdist(self.weight, self.weight, p=math.inf) * reach.linf

    monkeypatch.setattr(AffineHead, "pair_constants", largest_entry)
    assert flips(model, x, certify(model, x, norm, method="margin")) > 0


def test_catches_a_missing_factor_two():
    """A Lipschitz network moves both logits of a margin."""
    model = nn.Sequential(LinfDistance(2, 2, bias=False), Scale(-1.0)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    x = torch.tensor([[0.1, 0.1], [0.2, 0.3], [0.9, 0.8]])
    c = certify(model, x, method="margin")
    assert flips(model, x, c) == 0
    assert flips(model, x, Certificate(c.predicted, 2 * c.radius, "linf", "margin")) == 3


def test_lower_bound_catches_an_understated_constant_and_reaches_the_true_one():
    for norm in ("linf", "l2"):
        model = nn.Sequential(NormalizedLinear(6, 6, orthogonalize=20), MaxMin(), NormalizedLinear(6, C)).eval()
        found = lipschitz_lower_bound(model, (6,), norm, restarts=6, steps=60)
        assert found.shape == (C, C) and bool((found == found.T).all()) and bool((found.diagonal() == 0).all())
        graph = trace(model)
        constants = lipschitz(graph, graph.evaluate(torch.zeros(1, 6)))
        generic = 2 * constants.linf if norm == "linf" else math.sqrt(2) * constants.l2
        assert float(found.amax()) <= generic * (1 + 1e-6)
        if norm == "l2":
            assert float(found.amax()) > 0.95 * generic
    distances = nn.Sequential(LinfDistance(5, 8), LinfDistance(8, C)).eval()
    reached = float(lipschitz_lower_bound(distances, (5,), "linf", restarts=10, steps=80).amax())
    assert 1.9 < reached <= 2 * (1 + 1e-6)
