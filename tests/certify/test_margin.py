# SPDX-License-Identifier: Apache-2.0
"""Margin certificates: exact where they can be, never beyond the nearest flip, and blind to what does not matter."""

import math

import pytest
import torch
from torch import nn

from dplip.audit.robustness import lipschitz_lower_bound
from dplip.certify import certify
from dplip.certify.margin import FARTHEST, MarginCertifier
from dplip.certify.subject import Subject
from dplip.layers import Flatten, LinfDistance, MaxMin, NormalizedLinear, ReferenceShift, Scale, Shift
from tests.certify.zoo import NETS, C, D, build, inputs

NORMS = ("linf", "l2")


def certifier(model, x, norm):
    subject = Subject(model, x.dtype)
    return MarginCertifier(subject, norm, subject.at(x).values)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["margin", "best"])
def test_exact_for_a_linear_model(norm, method):
    model = nn.Sequential(Flatten(), nn.Linear(6, 4), Scale(-3.0), Shift(0.7)).double().eval()
    x = torch.randn(50, 2, 3, dtype=torch.float64)
    c = certify(model, x, norm, method=method)
    z, w = model(x).detach(), -3.0 * model[1].weight.detach()
    top = z.argmax(1)
    difference = w[top][:, None] - w
    size = difference.abs().sum(2) if norm == "linf" else difference.norm(dim=2)
    distance = ((z.gather(1, top[:, None]) - z) / size).nan_to_num(math.inf).amin(1)
    assert torch.equal(c.predicted, top)
    torch.testing.assert_close(c.radius, distance, rtol=1e-9, atol=1e-9)
    assert bool((c.radius <= distance).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["linf", "sort", "spectral", "relu", "clip", "large"])
def test_radius_stays_below_the_nearest_flip_on_a_grid(name, norm):
    """Exhaustive: a plane through the input, 161 x 161 points."""
    model, x = build(name), inputs(4)[:6]
    c = certify(model, x, norm)
    u, v = torch.zeros(D), torch.zeros(D)
    u[0], v[1] = 1.0, 1.0
    for i, centre in enumerate(x):
        reach = 3 * float(c.radius[i])
        t = torch.linspace(-reach, reach, 161)
        points = centre + t[:, None, None] * u + t[None, :, None] * v
        move = (points.double() - centre.double()).reshape(-1, D)
        length = move.abs().amax(1) if norm == "linf" else move.norm(dim=1)
        with torch.no_grad():
            flipped = model(points.reshape(-1, D)).argmax(1) != c.predicted[i]
        nearest = float(length[flipped].amin()) if bool(flipped.any()) else math.inf
        assert float(c.radius[i]) <= nearest


def test_the_l_inf_radius_of_two_templates_is_half_the_margin_and_is_reached():
    model = nn.Sequential(LinfDistance(2, 2, bias=False), Scale(-1.0)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    x = torch.tensor([[0.2, 0.2]], dtype=torch.float64)
    radius = float(certify(model, x, method="margin").radius)
    assert radius == pytest.approx(0.3, abs=1e-9)
    with torch.no_grad():
        assert model(x + radius * 1.001).argmax(1).item() == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", sorted(NETS))
def test_no_pair_of_inputs_beats_a_pair_constant(name, norm):
    model = build(name)
    found = lipschitz_lower_bound(model, (D,), norm, restarts=4, steps=25)
    constants = certifier(model, inputs(), norm).constants
    assert bool((found <= constants * (1 + 1e-6) + 1e-12).all()), float((found / constants).nan_to_num().amax())


@pytest.mark.parametrize("norm", NORMS)
def test_the_head_is_tighter_than_the_generic_rule_and_attained(norm):
    model = nn.Sequential(NormalizedLinear(D, D, bias=False), MaxMin(), NormalizedLinear(D, C)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(D))
        model[2].weight.copy_(0.4 * torch.randn(C, D))
    margins = certifier(model, inputs(), norm)
    out = margins.reach[margins.subject.graph.output]
    generic = min(2 * out.linf, math.sqrt(2) * out.l2)
    pairs = margins.constants[~torch.eye(C, dtype=torch.bool)]
    assert bool((pairs <= generic).all()) and float(pairs.amin()) < 0.999 * generic
    found = lipschitz_lower_bound(model, (D,), norm, restarts=6, steps=60)
    assert bool((found <= margins.constants * (1 + 1e-9)).all())
    assert bool((found >= 0.99 * margins.constants).all())
    w = model[2].weight.detach().double()
    exact = torch.cdist(w, w, p=1.0 if norm == "linf" else 2.0)
    torch.testing.assert_close(margins.constants, exact, rtol=1e-9, atol=1e-12)


def test_a_shifted_or_branching_head_is_found_only_where_it_is_affine():
    x = torch.rand(3, D)
    shifted = nn.Sequential(ReferenceShift(NormalizedLinear(D, C), 0.5), Scale(2.0)).eval()
    assert certifier(shifted, x, "l2").head.factor == 2.0
    assert certifier(nn.Sequential(nn.Linear(D, C), nn.ReLU()).eval(), x, "l2").head is None
    assert certifier(build("branches"), x, "l2").head is None

    class Square(NormalizedLinear):
        def forward(self, x):
            return super().forward(x) * 0.5

    assert certifier(nn.Sequential(Square(D, C)).eval(), x, "l2").head is None


@pytest.mark.parametrize("norm", NORMS)
def test_ties_and_dead_models(norm):
    tie = nn.Linear(D, C)
    with torch.no_grad():
        tie.weight[1] = tie.weight[0]
        tie.bias[:] = torch.tensor([5.0, 5.0, -5.0])
    assert certify(tie.eval(), torch.rand(4, D), norm).radius.tolist() == [0.0] * 4
    dead = nn.Linear(D, C)
    with torch.no_grad():
        dead.weight.zero_()
        dead.bias[:] = torch.tensor([1.0, 0.0, 0.0])
    assert certify(dead.eval(), torch.rand(1, D), norm).radius.item() == pytest.approx(FARTHEST)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["margin", "interval", "best"])
def test_permuting_classes_and_shifting_logits_changes_nothing(norm, method):
    model, x = build("relu").double(), inputs().double()
    before = certify(model, x, norm, method=method)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        model[4].weight.copy_(model[4].weight[order])
        model[4].bias.copy_(model[4].bias[order] + 17.0)
    after = certify(model, x, norm, method=method)
    assert torch.equal(order[after.predicted], before.predicted)
    torch.testing.assert_close(after.radius, before.radius, rtol=1e-3, atol=1e-11)


@pytest.mark.parametrize("method", ["margin", "interval", "best"])
def test_translating_inputs_and_weights_changes_nothing(method):
    model, x = build("sort").double(), inputs().double()
    before = certify(model, x, method=method)
    move = torch.randn(D, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.add_(move)
    after = certify(model, x + move, method=method)
    torch.testing.assert_close(after.radius, before.radius, rtol=1e-3, atol=1e-11)


def test_companions_in_the_batch_change_nothing():
    model, x = build("relu"), inputs()
    together = certify(model, torch.cat([x, x * 1e20, x * math.nan]), "l2").radius[: len(x)]
    alone = torch.cat([certify(model, row[None], "l2").radius for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-9)
