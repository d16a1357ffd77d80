# SPDX-License-Identifier: Apache-2.0
"""The rounding of deployed logits stays within its bound, at the centre and over the ball."""

import copy
import math

import pytest
import torch
from torch import nn

from dplip.bounds import unit_radii
from dplip.certify import certify
from dplip.certify.margin import MarginCertifier
from dplip.certify.roundoff import Roundoff
from dplip.certify.subject import Subject
from dplip.errors import BoundViolation
from dplip.layers import AveragePool2d, BallClip, Flatten, NormalizedLinear, Scale, SortLinear
from tests.certify.zoo import NETS, C, D, build, inputs


def measured(model, x):
    """Largest error of a logit difference, and the bound on it: [B] each."""
    subject = Subject(model, x.dtype)
    point = subject.at(x)
    margins = MarginCertifier(subject, "linf", point.values)
    deployed, here = margins.slack(point, torch.zeros(len(x), dtype=torch.float64))
    difference = point.deployed - point.values[subject.graph.output]
    return difference.amax(1) - difference.amin(1), deployed + here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(NETS))
def test_the_bound_holds_at_hard_inputs(name, dtype):
    model = build(name).to(dtype)
    x = torch.cat([inputs(200), 1e4 * inputs(20), 1e-5 * inputs(20), 1 + 1e-3 * inputs(20)]).to(dtype)
    error, bound = measured(model, x)
    assert bool((error <= bound).all()), float((error / bound).amax())


@pytest.mark.parametrize("name", ["linf", "sort", "spectral", "relu"])
def test_the_bound_is_of_the_order_of_the_error(name):
    """Within a factor that still leaves radii useful: a bound of infinity would pass every other test."""
    error, bound = measured(build(name), inputs(300))
    assert float(bound.median()) < 2000 * float(error.median())


def test_cancellation_behind_a_large_gain_is_seen():
    """The logits are small differences of large numbers: a bound relative to the logits would be far too small."""
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -1.0], [0.5, -0.5]]))
        linear.bias.zero_()
    model = nn.Sequential(Scale(0.1), linear, Scale(1e4)).eval()
    x = 1000 + torch.rand(500, 1).expand(-1, 2) + torch.tensor([0.0, 1e-4])
    error, bound = measured(model, x)
    assert float(error.amax()) > 0.01 and bool((error <= bound).all())


def test_dots_of_many_terms_and_images():
    model = nn.Sequential(AveragePool2d(2), Flatten(), BallClip(3.0), NormalizedLinear(196, 10), Scale(7.0)).eval()
    error, bound = measured(model, torch.rand(64, 1, 28, 28))
    assert bool((error <= bound).all()) and float(bound.amax()) < 1e-2


def test_error_grows_with_the_ball():
    model, x = build("relu"), inputs()
    subject = Subject(model, x.dtype)
    values = subject.at(x).values
    roundoff = Roundoff(subject.graph, values)
    reach = unit_radii(subject.graph, values, "linf")
    errors = [
        roundoff.logit_errors(values, reach, torch.full((len(x),), r, dtype=torch.float64), torch.float32)
        for r in (0.0, 1.0, 100.0)
    ]
    assert bool((errors[0] < errors[1]).all()) and bool((errors[1] < errors[2]).all())


def test_overflow_and_too_coarse_arithmetic_leave_no_claim():
    wide = nn.Sequential(NormalizedLinear(2000, C)).to(torch.bfloat16).eval()
    assert certify(wide, torch.rand(3, 2000).to(torch.bfloat16), "l2").radius.tolist() == [0.0] * 3
    model = nn.Sequential(nn.Linear(D, C), Scale(1e30)).eval()
    assert certify(model, 1e10 * torch.rand(3, D), "l2").radius.tolist() == [0.0] * 3


def test_a_deployment_that_is_not_the_traced_model_is_refused():
    model, x = build("relu"), inputs()
    handle = model[2].register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(BoundViolation, match="hooks"):
        certify(model, x)
    handle.remove()
    assert float(certify(model, x).radius.amax()) > 0


def test_a_layer_that_hides_its_roundings_is_refused():
    class Hidden(NormalizedLinear):
        def forward(self, x):
            return (x.half() @ self.weight.half().T).to(x.dtype) if x.dtype == torch.float32 else super().forward(x)

    model = nn.Sequential(Hidden(D, C, bias=False)).eval()
    with pytest.raises(BoundViolation, match="fan_in"):
        certify(model, torch.rand(20, D))


def test_float64_deployment_costs_next_to_nothing():
    x = inputs()
    single, double = build("relu"), copy.deepcopy(build("relu")).double()
    a, b = certify(single, x, "l2", method="margin").radius, certify(double, x.double(), "l2", method="margin").radius
    assert bool((a <= b).all()) and math.isclose(float(a.sum()), float(b.sum()), rel_tol=1e-2)


def test_many_order_statistics():
    model = nn.Sequential(SortLinear.geometric(300, 40, 0.9, 50), SortLinear.top_k_mean(40, 10, 20)).eval()
    error, bound = measured(model, torch.rand(50, 300))
    assert bool((error <= bound).all()) and float(bound.amax()) < 1e-3
