# SPDX-License-Identifier: Apache-2.0
"""The p schedule: values, certificates and bounds while it runs."""

import math

import pytest
import torch
from torch import nn

from dplip.bounds import InputDomain, lipschitz, trace
from dplip.certify import certify
from dplip.errors import ConfigError
from dplip.layers import LinfDistance, NormalizedLinear, Scale, SortLinear, StochasticSortLinear
from dplip.losses import CrossEntropy
from dplip.privacy.sensitivity import StepSensitivity
from dplip.recipes import GeometricDecay, PSchedule, at_p, distance_groups, scale_learning_rates, set_p


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LinfDistance(6, 8, bias=False), LinfDistance(8, 8), LinfDistance(8, 3), Scale(-1.0)).double()


def test_values_of_the_published_schedule() -> None:
    schedule = PSchedule(8, 1000, begin=50, finish=350)
    for epoch, p in ((0, 8), (50, 8), (125, 8 * 125**0.25), (200, math.sqrt(8000)), (349.999, 1000), (350, math.inf)):
        assert schedule.at(epoch) == pytest.approx(p, rel=1e-4)
    assert PSchedule(8, 50, finish=10, last=50).at(11) == 50
    assert PSchedule(finish=0).at(0) == math.inf


def test_weight_decays_with_p() -> None:
    decay, schedule = GeometricDecay(0.1, 0.001, 50, 350), PSchedule(10, 1000, 50, 350)
    for t in (0, 60, 123.4, 300):
        assert decay.at(t) * schedule.at(t) == pytest.approx(1.0)
    assert decay.at(1000) == pytest.approx(0.001)


@pytest.mark.parametrize("options", [{"start": 1.5}, {"end": math.inf}, {"last": 1.0}, {"start": math.nan}])
def test_exponents_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        PSchedule(**options)


def test_set_p_reaches_every_annealed_layer_and_no_other() -> None:
    model = nn.ModuleList([LinfDistance(3, 2), StochasticSortLinear(3, 2, 0.5), SortLinear(3, 2, [1.0])])
    set_p(model, 17)
    assert (model[0].p, model[1].p) == (17, 17)
    with at_p(model, math.inf):
        assert math.isinf(model[0].p)
    assert model[0].p == 17
    with pytest.raises(ConfigError, match="LinfDistance"):
        set_p(NormalizedLinear(3, 2), 8)


@pytest.mark.parametrize("p", [2, 8, 31.7, 1000, math.inf])
def test_bounds_and_certificates_hold_at_every_p(p: float) -> None:
    model, domain, loss = net(), InputDomain((6,), 0, 1), CrossEntropy(30.0)
    PSchedule(start=p, end=p, finish=1).apply(model, 0) if p < math.inf else set_p(model, p)
    x, y = torch.rand(30, 6, dtype=torch.float64), torch.randint(3, (30,))
    x[:10] = x[:10].round()
    x[10] = model[0].weight[0].detach()
    x.clamp_(0, 1)
    bounds = StepSensitivity(model, domain, loss).tensors()
    for b in range(30):
        grads = torch.autograd.grad(loss(model(x[b : b + 1]), y[b : b + 1]), list(model.parameters()))
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            assert float(grad.norm()) <= bounds[name].bound
    model.eval()
    assert lipschitz(trace(model), trace(model).evaluate(x)).linf <= 1 + 1e-9
    certificate = certify(model, x)
    radius = certificate.radius[:, None]
    assert float(radius.max()) > 0
    for _ in range(50):
        moved = model(x + radius * (2 * torch.rand_like(x).round() - 1))
        assert torch.equal(moved.argmax(1)[radius[:, 0] > 0], certificate.predicted[radius[:, 0] > 0])


def test_sensitivity_at_infinity_does_not_cover_a_finite_p_of_the_plain_distance() -> None:
    sizes = ((64, 8), (8, 9), (9, 3))
    model = nn.Sequential(*[LinfDistance(d, m, power_mean=False) for d, m in sizes]).double()
    domain, bounds = InputDomain((64,), 0, 1), {}
    for p in (8.0, math.inf):
        set_p(model, p)
        bounds[p] = StepSensitivity(model, domain, CrossEntropy()).tensors()["0.weight"].bound
    assert bounds[8.0] == pytest.approx(9 ** (1 / 8) * bounds[math.inf], rel=1e-6)


def test_learning_rates_undo_the_power_means_factor() -> None:
    model = nn.Sequential(LinfDistance(64, 4, p=8), LinfDistance(4, 2, p=8, power_mean=False)).double()
    plain = nn.Sequential(
        LinfDistance(64, 4, p=8, power_mean=False), LinfDistance(4, 2, p=8, power_mean=False)
    ).double()
    plain.load_state_dict(model.state_dict())
    x = torch.rand(5, 64, dtype=torch.float64)
    optimizer = torch.optim.SGD(distance_groups(model, 0.1), lr=0.1)
    scale_learning_rates(optimizer, 8, factor=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05 * 64**0.125, 0.05])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    steps = []
    for m, lr in ((model[0], 64**0.125), (plain[0], 1.0)):
        m.zero_grad()
        m(x).sum().backward()
        steps.append(lr * m.weight.grad)
    torch.testing.assert_close(steps[0], steps[1])
    with pytest.raises(ConfigError, match="distance_groups"):
        scale_learning_rates(torch.optim.SGD(model.parameters(), lr=0.1), 8)


def test_identity_initialisation_copies_the_input() -> None:
    torch.manual_seed(0)
    layer, x = LinfDistance(4, 10, init="identity", bias=False), torch.rand(6, 4)
    torch.testing.assert_close(layer(x), x[:, torch.arange(10) % 4] + 10)
    with pytest.raises(ConfigError, match="identity"):
        LinfDistance(5, 4, init="identity")
