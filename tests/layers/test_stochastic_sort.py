# SPDX-License-Identifier: Apache-2.0
"""Training by random maxima: masks, expectation, deployment and the privacy bound of a draw."""

import itertools
import math

import pytest
import torch
from torch import nn

from dplip.bounds import InputDomain
from dplip.certify import certify
from dplip.errors import ConfigError, NoRuleError, UnboundedInputError, UnsoundCertificate
from dplip.layers import (
    LipschitzLayer,
    ReferenceShift,
    Scale,
    SortLinear,
    StochasticSortLinear,
    advance_masks,
    example_keys,
)
from dplip.losses import CrossEntropy
from dplip.privacy.sensitivity import StepSensitivity
from dplip.testing import LayerContract


class TestDraw(LayerContract):
    in_shape = (7,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return StochasticSortLinear(7, 4, 0.6)


class TestPowerMeanDraw(LayerContract):
    in_shape = (6,)

    def make(self) -> LipschitzLayer:
        return StochasticSortLinear(6, 4, 0.6, p=8, seed=2)


class TestEmptyDraw(LayerContract):
    in_shape = (2,)

    def make(self) -> LipschitzLayer:
        return StochasticSortLinear(2, 3, 1e-9)


class TestDeployed(LayerContract):
    in_shape = (7,)
    tight = frozenset({"weight", "bias"})

    def make(self) -> LipschitzLayer:
        return StochasticSortLinear(7, 4, 0.6).eval()


X = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("keep", [0.3, 0.7, 1.0])
def test_expected_maximum_is_the_sort_neuron(keep: float) -> None:
    torch.manual_seed(0)
    layer = StochasticSortLinear(6, 5, keep, None, bias=False).double()
    mean = torch.zeros(12, 5, dtype=torch.float64)
    for kept in itertools.product((False, True), repeat=6):
        probability = math.prod(keep if k else 1 - keep for k in kept)
        mean += probability * layer.draw(X, layer.weight, torch.tensor(kept)).detach()
    torch.testing.assert_close(
        mean, (1 - (1 - keep) ** 6) * layer.eval()(X).detach(), rtol=1e-6, atol=1e-6
    )  # float32 weights c


def test_masks_have_the_keep_probability_and_expectation() -> None:
    torch.manual_seed(0)
    layer, n = StochasticSortLinear(6, 3, 0.4, None, bias=False).double(), 3000
    masks, mean = torch.zeros(n, 6), torch.zeros(12, 3, dtype=torch.float64)
    for t in range(n):
        masks[t] = layer.mask()
        mean += layer(X).detach() / n
        advance_masks(layer)
    assert float((masks.mean(0) - 0.4).abs().max()) < 5 * math.sqrt(0.24 / n)
    correlation = torch.corrcoef(masks.T) - torch.eye(6)
    assert float(correlation.abs().max()) < 5 / math.sqrt(n)
    assert abs(float((masks[1:] * masks[:-1]).mean()) - 0.16) < 5 * math.sqrt(0.14 / n)
    assert float((mean - (1 - 0.6**6) * layer.eval()(X)).detach().abs().max()) < 5 * 2 / math.sqrt(n)


def test_deployed_neuron_is_exact_and_blind_to_masks_and_p() -> None:
    layer = StochasticSortLinear.geometric(6, 4, 0.3, p=8).double().eval()
    exact = SortLinear.geometric(6, 4, 0.3).double()
    exact.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "mask_step"})
    before = layer(X)
    torch.testing.assert_close(before, exact(X))
    advance_masks(layer)
    layer.p = math.inf
    assert torch.equal(layer(X), before)
    assert layer.row_norms() == exact.row_norms()


def test_masks_survive_a_state_dict_and_differ_between_steps_and_seeds() -> None:
    layer = StochasticSortLinear(60, 2, 0.5)
    first = layer.mask()
    advance_masks(layer)
    assert not torch.equal(layer.mask(), first)
    other = StochasticSortLinear(60, 2, 0.5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.mask(), layer.mask())
    assert not torch.equal(StochasticSortLinear(60, 2, 0.5, seed=1).mask(), first)
    assert not torch.equal(layer.mask(1), layer.mask(0))


def test_removing_a_record_gives_no_other_record_a_new_mask() -> None:
    layer = StochasticSortLinear(6, 4, 0.5, groups=5).double()
    keys = torch.tensor([7, 101, 4, 22, 15, 3, 9, 81, 6, 12, 13, 19])
    with example_keys(layer, keys):
        y = layer(X)
    for gone in range(len(X)):
        rest = torch.arange(len(X)) != gone
        with example_keys(layer, keys[rest]):
            assert torch.equal(layer(X[rest]), y[rest])
    with example_keys(layer, keys.flip(0)):
        assert torch.equal(layer(X.flip(0)).flip(0), y)
    for row, key in enumerate(keys.tolist()):
        expected = layer.draw(X[row : row + 1], layer.weight, layer.mask(key % 5)) + layer.bias
        torch.testing.assert_close(y[row : row + 1], expected)


def test_keyed_gradients_are_those_of_autograd() -> None:
    layer = StochasticSortLinear(6, 4, 0.5, groups=3).double()
    with example_keys(layer, torch.arange(12) * 7):
        g = torch.randn(12, 4, dtype=torch.float64)
        (expected,) = torch.autograd.grad(layer(X), layer.weight, g)
        got = layer.per_sample_grad(X, g)["weight"]
    torch.testing.assert_close(got.sum(0), expected)
    assert bool((got.flatten(1).norm(dim=1) <= g.norm(dim=1) * (1 + 1e-12)).all())


def test_a_draw_exceeds_the_bound_of_the_exact_neuron_and_obeys_its_own() -> None:
    layer = StochasticSortLinear(6, 4, 0.5, bias=False).double()
    g = torch.ones(12, 4, dtype=torch.float64)
    norm = float(layer.per_sample_grad(X, g)["weight"].detach().flatten(1).norm(dim=1).max())
    assert norm > 1.2 * layer.eval().row_norms().l2 * 2
    assert norm <= layer.train().row_norms().l2 * 2 * (1 + 1e-12)


def test_keyed_masks_leave_activations_without_a_bound() -> None:
    def net(groups: int) -> nn.Module:
        return nn.Sequential(StochasticSortLinear(6, 4, 0.5, groups=groups), nn.Linear(4, 3))

    domain = InputDomain((6,), 0, 1)
    StepSensitivity(net(1), domain, CrossEntropy())
    with pytest.raises(UnboundedInputError):
        StepSensitivity(net(4), domain, CrossEntropy())
    distances = nn.Sequential(StochasticSortLinear(6, 4, 0.5, groups=4), StochasticSortLinear(4, 3, 0.5, groups=4))
    StepSensitivity(distances, domain, CrossEntropy())
    with pytest.raises(NoRuleError, match="groups=1"):
        net(4)[0].interval(X.float(), X.float())


def test_per_example_gradients_of_a_net_obey_its_sensitivity() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        ReferenceShift(StochasticSortLinear(6, 8, 0.5, bias=False), 0.5),
        StochasticSortLinear(8, 3, 0.5, seed=1),
        Scale(-1.0),
    ).double()
    loss, domain = CrossEntropy(20.0), InputDomain((6,), 0, 1)
    x, y = torch.rand(40, 6, dtype=torch.float64).round(), torch.randint(3, (40,))
    for _ in range(5):
        bounds = StepSensitivity(model, domain, loss).tensors()
        for b in range(40):
            grads = torch.autograd.grad(loss(model(x[b : b + 1]), y[b : b + 1]), list(model.parameters()))
            for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
                assert float(grad.norm()) <= bounds[name].bound
        advance_masks(model)


def test_training_mode_is_not_certified() -> None:
    model = nn.Sequential(StochasticSortLinear(6, 4, 0.5), Scale(-1.0))
    with pytest.raises(UnsoundCertificate):
        certify(model, X.float())
    assert float(certify(model.eval(), X.float()).radius.max()) > 0


def test_wrong_use_is_refused() -> None:
    for options in (
        {"keep": 0.0},
        {"keep": 1.5},
        {"keep": 0.5, "groups": 0},
        {"keep": 0.5, "p": 1},
        {"keep": 0.5, "seed": -1},
    ):
        with pytest.raises(ConfigError, match="StochasticSortLinear"):
            StochasticSortLinear(6, 4, **options)
    with pytest.raises(ConfigError, match="top-k"):
        StochasticSortLinear.top_k_mean(6, 4, 2)
    layer = StochasticSortLinear(6, 4, 0.5, groups=2).double()
    with pytest.raises(ConfigError, match="int64"), example_keys(layer, torch.rand(12)):
        pass
    with example_keys(layer, torch.arange(5)), pytest.raises(ValueError, match="batch of 5"):
        layer(X)


def test_private_steps_use_bounds_of_the_mask_that_ran() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(StochasticSortLinear(6, 5, 0.5), nn.Linear(5, 3)).double()  # an affine layer sees activations
    loss, domain = CrossEntropy(), InputDomain((6,), 0, 1)
    x, y = torch.rand(30, 6, dtype=torch.float64).round(), torch.randint(3, (30,))
    sensitivity, seen = StepSensitivity(model, domain, loss), set()
    for _ in range(6):
        bound = sensitivity.tensors()["1.weight"].bound
        for b in range(30):
            (grad,) = torch.autograd.grad(loss(model(x[b : b + 1]), y[b : b + 1]), model[1].weight)
            assert float(grad.norm()) <= bound
        seen.add(round(bound, 6))
        advance_masks(model)
    assert len(seen) > 1  # the mask of the step enters the bound


def test_two_models_in_one_process_share_no_masks() -> None:
    """The original keeps its masks in attributes of the class."""

    def draws(model: nn.Module, other: nn.Module | None) -> list[torch.Tensor]:
        seen = []
        for _ in range(3):
            seen.append(model(X).detach())
            if other is not None:
                other(X)
                advance_masks(other)
            advance_masks(model)
        return seen

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            StochasticSortLinear(6, 5, 0.5, seed=seed), StochasticSortLinear(5, 3, 0.5, seed=9)
        ).double()

    alone, beside = draws(make(1), None), draws(make(1), make(2))
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
