# SPDX-License-Identifier: Apache-2.0
"""A layer's gradients under Opacus are those of the call that was made, whatever changed since; the rest is refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping_fsdp import GradSampleHooksFastGradientClippingFSDP
from opacus.grad_sample.utils import prepare_module
from torch import Tensor, nn

from dplip.errors import IncompatibleModelError, NoRuleError
from dplip.interop.opacus import prepare
from dplip.layers import (
    LearnedScale,
    LinfDistance,
    LipschitzLayer,
    NormalizedLinear,
    PositionBias,
    SortLinear,
    StochasticSortLinear,
    advance_masks,
    example_keys,
)
from dplip.norms import OperatorNorms
from tests.interop.test_opacus_layers import loop, norms

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

MODES = ["hooks", "functorch", "ghost"]


def require(host: nn.Module, model: nn.Module, expected: dict[str, Tensor], mode: str) -> None:
    if mode == "ghost":
        torch.testing.assert_close(host.get_norm_sample(), norms(expected))
        return
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[name])


class Blend(LipschitzLayer):
    """``y = x * (bias + share)``: a layer of a user's own, with an option of its forward and of its rule."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, share: float | Tensor = 0.0) -> Tensor:
        return x * self.bias**2 + x * self.bias * share

    def operator_norms(self, shapes):
        return OperatorNorms.uniform(float(self.bias.abs().max()) ** 2)

    def per_sample_grad(self, x: Tensor, g: Tensor, share: float | Tensor = 0.0) -> dict[str, Tensor]:
        return {"bias": 2 * g * x * self.bias + g * x * share}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after", [3.0, float("inf")])
def test_p_is_that_of_the_forward_pass(mode, after):
    model = nn.Sequential(LinfDistance(6, 4, p=8.0))
    x, g = torch.randn(5, 6), torch.randn(5, 4)
    expected = loop(copy.deepcopy(model), x, g)
    host = prepare_module(prepare(model), mode, loss_reduction="sum")
    loss = (host(x) * g).sum()
    model[0].p = after
    loss.backward()
    require(host, model, expected, mode)


@pytest.mark.parametrize("mode", MODES)
def test_annealing_between_steps_is_followed(mode):
    model = nn.Sequential(LinfDistance(6, 4, p=8.0))
    host = prepare_module(prepare(model), mode, loss_reduction="sum")
    for p in (8.0, 100.0, float("inf")):
        model[0].p = p
        plain = nn.Sequential(LinfDistance(6, 4, p=p))
        plain.load_state_dict(model.state_dict())
        x, g = torch.randn(5, 6), torch.randn(5, 4)
        host.zero_grad()
        (host(x) * g).sum().backward()
        require(host, model, loop(plain, x, g), mode)


@pytest.mark.parametrize("mode", MODES)
def test_masks_are_those_of_the_forward_pass(mode):
    """Keys are given in a context that ends, and masks move on, before the backward pass asks for gradients."""
    layer = StochasticSortLinear(6, 4, 0.5, groups=3, seed=1)
    x, g, keys = torch.randn(5, 6), torch.randn(5, 4), torch.tensor([4, 0, 1, 2, 7])
    rows = []
    for i in range(5):  # a plain layer per example, in the context of its key
        with example_keys(layer, keys[i : i + 1]):
            rows.append(loop(layer, x[i : i + 1], g[i : i + 1]))
    expected = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    assert len({int(k) % 3 for k in keys}) == 3
    model = nn.Sequential(layer)
    host = prepare_module(prepare(model), mode, loss_reduction="sum")
    with example_keys(model, keys):
        loss = (host(x) * g).sum()
    advance_masks(model)
    loss.backward()
    require(host, model, {f"0.{name}": v for name, v in expected.items()}, mode)


class Twice(nn.Module):
    """Calls one layer twice in each pass, in two states."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LinfDistance(6, 6, p=8.0)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.p = 3.0
        x = self.layer(x)
        with torch.no_grad():
            self.layer.p = 50.0
            self.layer(x)  # nobody asks about this call
        self.layer.p = float("inf")
        return self.layer(x)


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_two_calls_in_two_states(mode):
    model = Twice()
    x, g = torch.randn(5, 6), torch.randn(5, 6)
    expected = loop(copy.deepcopy(model), x, g)
    host = prepare_module(prepare(model), mode, loss_reduction="sum")
    loss = (host(x) * g).sum()
    host.eval()
    host(x)  # neither about this one
    host.train()
    loss.backward()
    require(host, model, expected, mode)


class Calls(nn.Module):
    def __init__(self, layer: nn.Module, **options) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, **self.options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [2.0, torch.full((6,), 3.0)])
def test_keywords_reach_the_rule(mode, share):
    model = Calls(Blend(), share=share)
    x, g = torch.randn(5, 6), torch.randn(5, 6)
    expected = loop(copy.deepcopy(model), x, g)
    host = prepare_module(prepare(model), mode, loss_reduction="sum")
    (host(x) * g).sum().backward()
    require(host, model, expected, mode)


class Deaf(Blend):
    def per_sample_grad(self, x, g):
        return super().per_sample_grad(x, g)


def test_a_keyword_the_rule_does_not_take_is_refused():
    host = prepare_module(prepare(Calls(Deaf(), share=2.0)), "hooks")
    with pytest.raises(IncompatibleModelError, match=r"Deaf: expected keywords that per_sample_grad takes.*share"):
        host(torch.ones(2, 6))


def test_a_second_positional_argument_is_refused():
    class Positional(Calls):
        def forward(self, x):
            return self.layer(x, 2.0)

    host = prepare_module(prepare(Positional(Blend())), "hooks")
    with pytest.raises(IncompatibleModelError, match="pass options by keyword"):
        host(torch.ones(2, 6))


def test_a_rule_that_forgets_a_parameter_is_refused():
    class Forgets(Blend):
        def per_sample_grad(self, x, g, share=0.0):
            return {}

    host = prepare_module(prepare(nn.Sequential(Forgets())), "hooks")
    with pytest.raises(NoRuleError, match=r"expected gradients for \['bias'\]"):
        host(torch.ones(2, 6)).sum().backward()


class Shifted(LipschitzLayer):
    """A user's layer with a parameter and a child of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.offset = LinfDistance(6, 4), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.inner(x) + self.offset

    def operator_norms(self, shapes):
        return self.inner.operator_norms(shapes)

    def per_sample_grad(self, x, g):
        return {"offset": g} | {f"inner.{name}": v for name, v in self.inner.per_sample_grad(x, g).items()}


@pytest.mark.parametrize("mode", MODES)
def test_parents_and_children_are_counted_once(mode):
    model = nn.Sequential(Shifted())
    x, g = torch.randn(5, 6), torch.randn(5, 4)
    expected = loop(copy.deepcopy(model), x, g)
    host = prepare_module(prepare(model), mode, loss_reduction="sum")
    (host(x) * g).sum().backward()
    require(host, model, expected, mode)


class Doubled(SortLinear):
    """A subclass with a formula of its own: ``y = 2 d``."""

    def distance(self, x, w):
        return 2 * super().distance(x, w)

    def per_sample_weight_grad(self, x, w, g):
        return super().per_sample_weight_grad(x, w, 2 * g)


@pytest.mark.parametrize("mode", MODES)
def test_a_subclass_answers_for_itself(mode):
    model = nn.Sequential(Doubled.geometric(6, 4, 0.5))
    x, g = torch.randn(5, 6), torch.randn(5, 4)
    expected = loop(copy.deepcopy(model), x, g)
    host = prepare_module(prepare(model), mode, loss_reduction="sum")
    (host(x) * g).sum().backward()
    require(host, model, expected, mode)
    assert Doubled not in GradSampleHooksFastGradientClipping.NORM_SAMPLERS


def test_exactly_the_classes_found_are_registered(monkeypatch):
    class Own(NormalizedLinear):
        pass

    for holder, name in (
        (GradSampleHooks, "GRAD_SAMPLERS"),
        (GradSampleHooksFastGradientClipping, "GRAD_SAMPLERS"),
        (GradSampleHooksFastGradientClipping, "NORM_SAMPLERS"),
    ):
        monkeypatch.setattr(holder, name, {nn.Linear: None})
    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4), PositionBias(4), nn.Sequential(LearnedScale()))
    assert prepare(model) is model
    assert set(GradSampleHooks.GRAD_SAMPLERS) == {nn.Linear, Own, PositionBias, LearnedScale}
    assert set(GradSampleHooksFastGradientClipping.GRAD_SAMPLERS) == {nn.Linear, Own, PositionBias, LearnedScale}
    assert set(GradSampleHooksFastGradientClipping.NORM_SAMPLERS) == {nn.Linear, Own}


def test_preparing_twice_changes_nothing():
    model = nn.Sequential(LinfDistance(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepare(model, optimizer)
    hooks = [*model[0]._forward_pre_hooks.values(), *model[0]._forward_hooks.values()]
    prepare(model, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    assert [*model[0]._forward_pre_hooks.values(), *model[0]._forward_hooks.values()] == hooks
    assert [name for name, _ in model.named_buffers()] == ["0._one"]
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_copies_of_a_prepared_model_are_prepared():
    model = prepare(nn.Sequential(LinfDistance(6, 4, p=8.0)))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        x, g = torch.randn(3, 6), torch.randn(3, 4)
        expected = loop(copy.deepcopy(twin), x, g)
        host = prepare_module(twin, "hooks", loss_reduction="sum")
        (host(x) * g).sum().backward()
        require(host, twin, expected, "hooks")


def test_a_prepared_model_runs_as_before_outside_opacus():
    model = nn.Sequential(LinfDistance(6, 4), NormalizedLinear(4, 2))
    x = torch.randn(3, 6, requires_grad=True)
    before = model(x)
    prepare(model)
    assert torch.equal(model(x), before)
    assert torch.autograd.grad(model(x).sum(), x)[0].shape == x.shape
    model.double()
    assert model[0]._one.dtype == torch.float64  # hidden from Opacus, not from torch


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_get_nothing(mode):
    model = nn.Sequential(LinfDistance(6, 4), NormalizedLinear(4, 2))
    model[0].weight.requires_grad_(False)
    x, g = torch.randn(3, 6), torch.randn(3, 2)
    twin = copy.deepcopy(model)
    expected = {n: v for n, v in loop(twin, x, g).items() if n != "0.weight"}
    host = prepare_module(prepare(model), mode, loss_reduction="sum")
    (host(x) * g).sum().backward()
    assert getattr(model[0].weight, "grad_sample", None) is None
    if mode == "ghost":
        torch.testing.assert_close(host.get_norm_sample(), norms(expected))
    else:
        for name, p in model.named_parameters():
            assert name == "0.weight" or torch.allclose(p.grad_sample, expected[name])


class Container(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.layer = nn.Parameter(torch.ones(1)), LinfDistance(6, 4, p=8.0)

    def forward(self, x):
        return self.gain * self.layer(x)


def test_a_layer_that_opacus_would_copy_is_refused():
    with pytest.raises(IncompatibleModelError, match=r"copies it whole.*LearnedScale"):
        prepare(nn.Sequential(Container()))


def test_a_layer_that_joins_later_is_refused():
    model = prepare(nn.Sequential(NormalizedLinear(6, 6)))
    model.append(NormalizedLinear(6, 4))
    host = prepare_module(model, "hooks")
    with pytest.raises(IncompatibleModelError, match=r"\['1'\] that joined the model later"):
        host(torch.ones(2, 6))


def test_a_model_that_was_never_prepared_is_refused():
    prepare(nn.Sequential(NormalizedLinear(6, 6)))  # so the class is known, but not the next model's layer
    host = prepare_module(nn.Sequential(NormalizedLinear(6, 6)), "hooks")
    with pytest.raises(IncompatibleModelError, match="expected a prepared layer"):
        host(torch.ones(2, 6)).sum().backward()


def test_a_private_model_cannot_be_prepared():
    host = prepare_module(prepare(nn.Sequential(LinfDistance(6, 4))), "hooks")
    with pytest.raises(IncompatibleModelError, match="before make_private"):
        prepare(host)


def test_batch_second_is_refused():
    host = prepare_module(prepare(nn.Sequential(LinfDistance(6, 4))), "hooks", batch_first=False)
    with pytest.raises(IncompatibleModelError, match="batch_first=True"):
        host(torch.ones(6, 6))


def test_fsdp_samplers_are_refused():
    model = prepare(nn.Sequential(LinfDistance(6, 4)))
    GradSampleHooksFastGradientClippingFSDP(model)
    with pytest.raises(IncompatibleModelError, match="hooks, functorch or ghost"):
        model(torch.ones(2, 6))


class Tied(nn.Module):
    """Two layers on one weight; the second has no norm sampler, the first one has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = NormalizedLinear(6, 6, bias=False), Doubled.geometric(6, 6, 0.5, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_shared_parameters_are_exact_or_refused():
    model = Tied()
    x, g = torch.randn(4, 6), torch.randn(4, 6)
    expected = loop(copy.deepcopy(model), x, g)
    host = prepare_module(prepare(copy.deepcopy(model)), "hooks", loss_reduction="sum")
    (host(x) * g).sum().backward()
    torch.testing.assert_close(next(host.parameters()).grad_sample, next(iter(expected.values())))
    host = prepare_module(prepare(model), "ghost", loss_reduction="sum")
    with pytest.raises(IncompatibleModelError, match=r"shared by \['first', 'second'\].*'hooks'"):
        host(x)


class Remembers(LipschitzLayer):
    """Trains a bias and keeps a running mean: Opacus refuses it for its buffer."""

    def __init__(self, through_data: bool = False) -> None:
        super().__init__()
        self.bias, self.through_data = nn.Parameter(torch.zeros(6)), through_data
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.through_data:
            self.mean.data.add_(1)
        else:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x + self.bias

    def operator_norms(self, shapes):
        return OperatorNorms.uniform(1.0)

    def per_sample_grad(self, x, g):
        return {"bias": g}


class Counter(nn.Module):
    """Trains nothing, so Opacus overlooks its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x


@pytest.mark.parametrize("layer", [Remembers(), Remembers(through_data=True), Counter()])
def test_buffers_that_a_pass_changes_are_refused_at_the_first(layer):
    host = prepare_module(prepare(nn.Sequential(nn.Linear(6, 6), layer)), "hooks")
    with pytest.raises(IncompatibleModelError, match=r"(mean|passes).*private data without noise"):
        host(torch.ones(2, 6))


def test_buffers_that_change_later_are_refused_too():
    class Sleeper(Counter):
        def forward(self, x):
            return super().forward(x) if len(x) > 2 else x

    host = prepare_module(prepare(nn.Sequential(nn.Linear(6, 6), Sleeper())), "hooks")
    host(torch.ones(2, 6)).sum().backward()
    with pytest.raises(IncompatibleModelError, match="passes"):
        host(torch.ones(3, 6))


def test_buffers_may_change_outside_forward():
    model = prepare(nn.Sequential(StochasticSortLinear(6, 4, 0.5)))
    host = prepare_module(model, "hooks")
    for _ in range(3):
        host.zero_grad()
        host(torch.ones(2, 6)).sum().backward()
        advance_masks(model)
    model.eval()
    host(torch.ones(2, 6))
