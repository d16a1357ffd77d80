# SPDX-License-Identifier: Apache-2.0
"""The contract of `certify`: attacks never flip, refusals are named, and the model is left alone."""

import math

import pytest
import torch
from torch import nn

from dplip.audit.robustness import attack, flips
from dplip.certify import METHODS, certify
from dplip.errors import ConfigError, DataError, MixesExamplesError, NoRuleError, UnsoundCertificate
from dplip.layers import LinfDistance, NormalizedLinear, ReferenceShift, Scale
from tests.certify.zoo import NETS, C, D, build, inputs


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", sorted(NETS))
def test_no_attack_flips_a_certified_example(name, norm):
    model, x = build(name, seed=1), inputs()
    c = certify(model, x, norm)
    with torch.no_grad():
        assert torch.equal(c.predicted, model(x).argmax(1))
    assert float(c.radius.amax()) > 0
    assert flips(model, x, c, restarts=6, steps=15) == 0


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("name", ["linf", "power_mean", "sort", "spline", "relu", "tied"])
def test_scaled_weights(name, factor):
    model, x = build(name), inputs()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    for norm in ("linf", "l2"):
        for scale in (1.0, factor):
            c = certify(model, x * scale, norm)
            assert flips(model, x * scale, c, restarts=4, steps=8) == 0


def test_inputs_on_the_templates_and_duplicates():
    model = build("tied")
    x = torch.cat([model[0].weight.detach(), model[0].weight.detach(), torch.full((2, D), 0.5)])
    c = certify(model, x)
    assert torch.equal(c.radius[:5], c.radius[5:10])
    assert flips(model, x, c) == 0


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_not_certified(method):
    model = build("relu")
    x = torch.rand(5, D)
    x[1, 0], x[2, 1], x[3, 2] = math.nan, math.inf, -math.inf
    radius = certify(model, x, method=method).radius
    assert radius[[1, 2, 3]].tolist() == [0.0] * 3 and bool((radius[[0, 4]] > 0).all())
    with torch.no_grad():
        model[4].bias[0] = math.inf
    assert certify(model, x[:1], method=method).radius.tolist() == [0.0]
    with torch.no_grad():
        model[4].bias[0] = 0.0
        model[0].weight[0, 0] = math.nan
    assert certify(model, x[:1], method=method).radius.tolist() == [0.0]


@pytest.mark.parametrize("method", METHODS)
def test_empty_batch_and_any_chunk(method):
    model, x = build("sort"), inputs()
    empty = certify(model, x[:0], method=method)
    assert len(empty) == 0 and empty.predicted.dtype == torch.int64 and empty.radius.dtype == torch.float64
    whole = certify(model, x, method=method)
    pieces = certify(model, x, method=method, batch_size=5)
    assert torch.equal(whole.predicted, pieces.predicted)
    torch.testing.assert_close(whole.radius, pieces.radius, rtol=1e-6, atol=1e-9)


def test_the_model_is_left_as_it_was():
    for name in ("spectral", "branches", "spline", "power_mean"):
        model = build(name)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        pointers = [p.data_ptr() for p in model.parameters()]
        x = inputs()
        flips(model, x, certify(model, x, "l2"), restarts=1, steps=2)
        assert [p.data_ptr() for p in model.parameters()] == pointers
        for key, value in model.state_dict().items():
            assert value.dtype == before[key].dtype and torch.equal(value, before[key])
        assert not any(m.training for m in model.modules())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_refuses_training_mode_anywhere():
    model = build("relu")
    model[1].train()
    with pytest.raises(UnsoundCertificate, match=r"'1'.*training"):
        certify(model, inputs())
    with pytest.raises(UnsoundCertificate, match="training"):
        certify(build("relu").train(), inputs())


@pytest.mark.parametrize("method", METHODS)
def test_refuses_autocast_and_never_selects_in_half_precision(method):
    model, x = build("linf"), inputs()
    before = certify(model, x, method=method)
    for layer in model.modules():
        if isinstance(layer, LinfDistance):
            layer.half_training = True
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype), pytest.raises(UnsoundCertificate, match="autocast to torch"):
            certify(model, x, method=method)
    assert torch.equal(certify(model, x, method=method).radius, before.radius)


def test_refuses_a_layer_that_is_not_the_deployed_function():
    plain = LinfDistance(D, C, p=8, power_mean=False)
    for model in (nn.Sequential(plain), plain, ReferenceShift(plain, 0.0)):
        with pytest.raises(UnsoundCertificate, match="p = 8"):
            certify(model.eval(), inputs())
    plain.p = math.inf
    assert float(certify(plain, inputs()).radius.amax()) > 0


def test_refuses_models_without_a_proof():
    mixing = nn.Sequential(nn.Linear(D, C), nn.BatchNorm1d(C)).eval()
    with pytest.raises(MixesExamplesError):
        certify(mixing, inputs())
    with pytest.raises(NoRuleError):
        certify(nn.Sequential(nn.Linear(D, C), nn.Softmax(1)).eval(), inputs())
    with pytest.raises(UnsoundCertificate, match="C >= 2"):
        certify(nn.Sequential(nn.Linear(D, 1)).eval(), inputs())
    mixed = nn.Sequential(nn.Linear(D, D), nn.Linear(D, C).double()).eval()
    with pytest.raises(UnsoundCertificate, match="one dtype"):
        certify(mixed, inputs())


def test_refuses_arguments():
    model = build("relu")
    for options in ({"norm": "l1"}, {"method": "guess"}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            certify(model, inputs(), **options)
    with pytest.raises(DataError, match="floating"):
        certify(model, torch.ones(2, D, dtype=torch.int64))
    with pytest.raises(DataError, match="floating"):
        certify(model, torch.ones(D))
    with pytest.raises(NoRuleError):
        certify(model, torch.rand(2, D + 1))


def test_an_input_of_higher_precision_is_rounded_first():
    model, x = build("relu"), inputs()
    fine = x.double() + 1e-12
    assert torch.equal(certify(model, fine).radius, certify(model, fine.float()).radius)


def test_deployment_in_coarse_arithmetic_holds_too():
    """bfloat16 has 8 bits: rounding alone flips classes, so the slack is what keeps the certificate true."""
    x = torch.rand(60, D).to(torch.bfloat16)
    for name in ("linf", "sort", "spectral", "relu"):
        model = build(name).to(torch.bfloat16)
        c = certify(model, x)
        assert flips(model, x, c, restarts=4, steps=15) == 0
    wide = nn.Sequential(LinfDistance(2, 2, bias=False), Scale(-1.0)).to(torch.bfloat16).eval()
    with torch.no_grad():
        wide[0].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    c = certify(wide, torch.tensor([[0.125, 0.125]], dtype=torch.bfloat16))
    assert 0.25 < c.radius.item() < 0.375


def test_rounding_alone_can_flip_what_exact_arithmetic_certifies():
    """Without the slack there is a point whose exact margin is positive and whose deployed class differs nearby."""
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
    model = nn.Sequential(nn.Flatten(), linear).eval()
    x = torch.tensor([[1000.0, 999.9999]])
    c = certify(model, x)
    exact = float(x.double()[0, 0] - x.double()[0, 1]) / 2
    assert c.radius.item() <= exact and flips(model, x, c) == 0
    assert not bool(attack(model, x, c.predicted, c.radius).flipped.any())


def test_a_single_layer_model():
    layer, x = NormalizedLinear(D, C).eval(), inputs()
    c = certify(layer, x, "l2")
    assert float(c.radius.amax()) > 0 and flips(layer, x, c, restarts=2, steps=5) == 0
