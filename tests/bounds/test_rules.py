# SPDX-License-Identifier: Apache-2.0
"""Rules for foreign modules and functions: each keeps the layer contract, and users can add their own."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from dplip.bounds import InputDomain, forward, input_like, lipschitz, register_rule, rules, sensitivities, trace
from dplip.bounds.rules import function_layer, has_rule, module_layer
from dplip.errors import NoRuleError
from dplip.layers import LipschitzLayer, Monotone, Scale
from dplip.norms import Norms
from dplip.testing import LayerContract


class Rule(LayerContract):
    """The contract of the layer that stands for a module."""

    in_shape = (5,)
    module: Callable[[], nn.Module]

    def make(self) -> LipschitzLayer:
        layer = module_layer(type(self).module())
        assert layer is not None
        return layer


class TestLinear(Rule):
    module = lambda: nn.Linear(5, 3)  # noqa: E731
    tight = frozenset({"weight", "bias"})


class TestLinearWithoutBias(Rule):
    module = lambda: nn.Linear(5, 6, bias=False)  # noqa: E731


class TestIdentity(Rule):
    module = nn.Identity


class TestReLU(Rule):
    module = nn.ReLU


class TestLeakyReLU(Rule):
    module = lambda: nn.LeakyReLU(0.2)  # noqa: E731


class TestSteepLeakyReLU(Rule):
    module = lambda: nn.LeakyReLU(3.0)  # noqa: E731


class TestTanh(Rule):
    module = nn.Tanh


class TestSigmoid(Rule):
    module = nn.Sigmoid


class TestSoftplus(Rule):
    module = lambda: nn.Softplus(beta=5)  # noqa: E731


class TestHardtanh(Rule):
    module = lambda: nn.Hardtanh(-0.3, 2.0)  # noqa: E731


class TestFlatten(Rule):
    in_shape = (2, 3)
    module = nn.Flatten


@pytest.mark.parametrize(
    "call",
    [
        (torch.relu, (), {}),
        ("tanh", (), {}),
        (torch.sigmoid, (), {}),
        ("abs", (), {}),
        (torch.clamp, (-1.0,), {"max": 0.5}),
        ("clip", (), {"min": 0.2}),
        ("flatten", (1,), {}),
        ("neg", (), {}),
        ("contiguous", (), {}),
    ],
    ids=lambda call: getattr(call[0], "__name__", call[0]),
)
def test_functions_have_the_value_of_their_layer(call: tuple) -> None:
    target, args, kwargs = call
    layer = function_layer(target, args, kwargs)
    assert layer is not None
    x = torch.randn(3, 4)
    expected = getattr(x, target)(*args, **kwargs) if isinstance(target, str) else target(x, *args, **kwargs)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.ReLU(inplace=True), "relu: expected inplace=False"),
        (nn.LeakyReLU(-0.1), "slope >= 0"),
        (nn.LeakyReLU(0.1, inplace=True), "inplace=False"),
        (nn.Hardtanh(inplace=True), "inplace=False"),
        (nn.Flatten(0), "start_dim=1"),
        (nn.Flatten(1, 2), "end_dim=-1"),
    ],
)
def test_options_without_a_bound_are_refused(module: nn.Module, text: str) -> None:
    with pytest.raises(NoRuleError, match=text):
        module_layer(module)


def test_a_rule_holds_for_the_exact_class_only() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert has_rule(nn.Linear(2, 2)) and not has_rule(Doubled(2, 2))
    assert module_layer(Doubled(2, 2)) is None
    with pytest.raises(NoRuleError, match="trainable parameter"):
        trace(nn.Sequential(Doubled(2, 2)))


def test_linear_takes_one_vector_an_example() -> None:
    with pytest.raises(NoRuleError, match="flatten it"):
        trace(nn.Sequential(nn.Linear(3, 2))).evaluate(torch.zeros(2, 4, 3))


def test_parametrized_weights_are_refused() -> None:
    """A bound on the effective weight's gradient is none on the parameter behind it."""
    linear = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    with pytest.raises(NoRuleError):
        trace(nn.Sequential(linear))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rules, "_MODULES", dict(rules._MODULES))
    monkeypatch.setattr(rules, "_FUNCTIONS", dict(rules._FUNCTIONS))
    yield


class Softsign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.abs())


@pytest.mark.usefixtures("tables")
def test_a_module_can_be_taught() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Softsign(), nn.Linear(3, 2))
    with pytest.raises(NoRuleError):
        trace(model)
    register_rule(Softsign, lambda module: Monotone(module, 1.0, bound=1.0))
    with torch.no_grad():
        model[0].weight.mul_(100)
    graph, domain = trace(model), InputDomain((3,), 0.0, 1.0)
    bounds = sensitivities(graph, forward(graph, domain, input_like(model, domain)), Norms(2, l2=1.0))
    assert bounds["2.weight"] == pytest.approx(3**0.5)  # the softsign's range bounds its output


@pytest.mark.usefixtures("tables")
def test_a_function_and_a_method_can_be_taught() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erf(x) + x.arctan()

    with pytest.raises(NoRuleError, match="erf"):
        trace(Model())
    register_rule(torch.erf, lambda: Monotone(torch.erf, 2 / torch.pi**0.5))
    with pytest.raises(NoRuleError, match="arctan"):
        trace(Model())
    register_rule("arctan", lambda: Monotone(torch.arctan))
    graph = trace(Model())
    assert lipschitz(graph, graph.evaluate(torch.zeros(1, 3))).linf == pytest.approx(1 + 2 / torch.pi**0.5)


@pytest.mark.usefixtures("tables")
def test_arguments_reach_a_functions_rule() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.hardtanh(x, -2.0, 2.0)

    register_rule(torch.nn.functional.hardtanh, lambda min_val, max_val, inplace: Scale(max_val - min_val))
    graph = trace(Model())
    assert lipschitz(graph, graph.evaluate(torch.zeros(1, 3))).l2 == pytest.approx(4.0)


@pytest.mark.parametrize("module", [nn.RMSNorm(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Softmax(1)])
def test_normalisations_without_a_constant_are_refused(module: nn.Module) -> None:
    """RMSNorm with a weight of 3 has a Jacobian of norm 9; the original monotone networks offer it as 1-Lipschitz."""
    with pytest.raises(NoRuleError, match=type(module).__name__):
        trace(nn.Sequential(nn.Linear(4, 4), module))
