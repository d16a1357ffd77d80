# SPDX-License-Identifier: Apache-2.0
"""Boxes contain what they claim to contain, never claim more than is true, and respect the domain."""

import itertools

import pytest
import torch
from torch import nn

from dplip.audit.robustness import attack, flips
from dplip.certify import certify
from dplip.certify.interval import IntervalCertifier
from dplip.certify.margin import MarginCertifier
from dplip.certify.subject import Subject
from dplip.errors import ConfigError, DataError, NoRuleError
from dplip.layers import LipschitzLayer, NormalizedLinear
from dplip.norms import OperatorNorms
from tests.certify.zoo import NETS, C, D, build, image, inputs


class Sine(LipschitzLayer):
    """1-Lipschitz, and without an interval rule."""

    def forward(self, x):
        return x.sin()

    def operator_norms(self, shapes):
        return OperatorNorms.uniform(1.0)

    def fan_in(self, shapes):
        return 4


def machinery(model, x, norm, domain=None):
    subject = Subject(model, x.dtype)
    point = subject.at(x)
    return IntervalCertifier(MarginCertifier(subject, norm, point.values), domain), subject, point


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_every_node_s_box_holds_corners_and_samples(name, norm, capped):
    boxes, subject, point = machinery(build(name), inputs(3), norm)
    signs = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=D)), dtype=torch.float64)
    signs = torch.cat([signs, 2 * torch.rand(200, D, dtype=torch.float64) - 1])
    if norm == "l2":
        signs = torch.cat([signs, torch.randn(100, D, dtype=torch.float64)])
        signs = signs / signs.norm(dim=1, keepdim=True).clamp_min(1e-9)
    near = boxes._enclose(point.x, point.x) if capped else None
    for eps in (1e-6, 0.05, 0.4):
        size = torch.full((len(point.x),), eps, dtype=torch.float64)
        low, high = boxes._input_box(point.x, size)
        found = boxes._enclose(low, high, near, size)
        for i in range(len(point.x)):
            values = subject.graph.evaluate(point.x[i] + eps * signs)
            for node, value in values.items():
                below, above = found[node][0][i], found[node][1][i]
                assert bool(((value >= below) & (value <= above)).all()), (node, eps)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_never_below_the_margin_and_never_beyond_an_attack(name, norm):
    model, x = build(name), inputs()
    margin, interval, best = (certify(model, x, norm, method=m) for m in ("margin", "interval", "best"))
    assert bool((best.radius >= margin.radius).all())
    assert bool((interval.radius >= margin.radius * (1 - 1e-3)).all())
    assert bool((best.radius >= interval.radius * (1 - 2e-3)).all())
    found = attack(model, x, best.predicted, best.radius, norm, restarts=3, steps=8)
    assert not bool(found.flipped.any())


def test_boxes_beat_the_margin_where_a_unit_is_dead():
    """relu(x - 10) is constant around 0: local boxes know, global constants do not."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double().eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-10.0)
        model[2].weight.copy_(torch.tensor([[0.0], [100.0]]))
        model[2].bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert certify(model, x, method="margin").radius.item() == pytest.approx(0.01)
    assert certify(model, x, method="best").radius.item() == pytest.approx(10.01, rel=1e-2)
    assert certify(model, x, method="best").radius.item() <= 10.01


def test_the_domain_is_respected_and_named():
    model, x = build("linf"), torch.rand(20, D).round() * 0.98 + 0.01
    free, cut = certify(model, x), certify(model, x, domain=(0.0, 1.0))
    assert bool((cut.radius >= free.radius * (1 - 2e-3)).all()) and bool((cut.radius > 1.05 * free.radius).any())
    assert "[0, 1]" in cut.method and "[0, 1]" not in free.method
    assert flips(model, x, cut, domain=(0.0, 1.0)) == 0
    with pytest.raises(DataError, match="domain"):
        certify(model, x, domain=(0.0, 0.5))
    with pytest.raises(ConfigError, match="lower <= upper"):
        certify(model, x, domain=(1.0, 0.0))
    # One rounding outside is still inside, and the centre never leaves its own box.
    edge = torch.full((1, D), 1.0).nextafter(torch.tensor(2.0))
    assert certify(model, edge, domain=(0.0, 1.0)).radius.item() >= 0
    assert certify(model, x, domain=(0.0, float("inf"))).radius.amin() >= 0


def test_a_domain_claim_holds_inside_and_only_there():
    """The class changes at x = -0.3, where no input of the domain lies."""
    model = nn.Sequential(nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[0].bias.copy_(torch.tensor([0.3, 0.0]))
    x = torch.zeros(1, 1)
    assert certify(model, x).radius.item() == pytest.approx(0.3, rel=1e-5)
    for norm in ("linf", "l2"):
        cut = certify(model, x, norm, domain=(0.0, 0.7))
        assert cut.radius.item() == pytest.approx(0.7)
        assert flips(model, x, cut, domain=(0.0, 0.7)) == 0
        assert flips(model, x, cut) == 1


def test_without_a_rule():
    model, x = nn.Sequential(Sine(), NormalizedLinear(D, C)).eval(), inputs()
    with pytest.raises(NoRuleError, match="interval"):
        certify(model, x, method="interval")
    best, margin = certify(model, x), certify(model, x, method="margin")
    assert best.method == "margin" and torch.equal(best.radius, margin.radius)


def test_images_and_undefined_boxes():
    x = torch.rand(10, 1, 2, 2)
    net = image()
    c = certify(net, x, domain=(0.0, 1.0))
    assert float(c.radius.amax()) > 0 and flips(net, x, c, domain=(0.0, 1.0), restarts=2, steps=5) == 0

    class Undefined(Sine):
        def interval(self, lower, upper):
            return torch.full_like(lower, float("nan")), torch.full_like(upper, float("nan"))

    model, x = nn.Sequential(nn.Linear(D, D), Undefined(), NormalizedLinear(D, C)).eval(), inputs()
    margin, boxed = (certify(model, x, method=m).radius for m in ("margin", "interval"))
    # Caps alone remain where a rule returns NaN.
    torch.testing.assert_close(boxed, margin, rtol=2e-3, atol=1e-9)
