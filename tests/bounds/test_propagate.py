# SPDX-License-Identifier: Apache-2.0
"""Whole networks: bounds by hand, containment of every activation, and where a bound needs a bounded input."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.bounds import InputDomain, forward, input_like, sensitivities, trace
from dplip.bounds.propagate import backward
from dplip.errors import BoundViolation, UnboundedInputError
from dplip.layers import (
    Abs,
    AveragePool2d,
    BallClip,
    Clamp,
    Flatten,
    LinearSpline,
    LinfDistance,
    MaxMin,
    NormalizedLinear,
    ReferenceShift,
    Residual,
    Scale,
    Shapes,
    SortLinear,
)
from dplip.norms import Norms

CROSS_ENTROPY = Norms(10, l1=2.0, l2=math.sqrt(2), linf=1.0)


def bounds(model: nn.Module, domain: InputDomain, g: Norms) -> dict[str, float]:
    return sensitivities(trace(model), forward(trace(model), domain, input_like(model, domain)), g)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_linf_networks_by_hand(depth: int, bias: bool) -> None:
    """sqrt(2) in the last layer, 2 in every other, whatever depth, width, weights and (unbounded) inputs."""
    layers = [LinfDistance(30, 30, bias=bias, init_scale=7.0) for _ in range(depth - 1)]
    model = nn.Sequential(*layers, LinfDistance(30, 10, bias=bias), Scale(-1.0))
    found = bounds(model, InputDomain((30,)), CROSS_ENTROPY)
    for name, bound in found.items():
        assert bound == pytest.approx(math.sqrt(2) if name.startswith(f"{depth - 1}.") else 2.0)
    total = math.sqrt(sum(b * b for b in found.values()))
    expected = 2 * 2 + 8 * (depth - 1) if bias else 2 + 4 * (depth - 1)
    assert total == pytest.approx(math.sqrt(expected))


def test_linf_networks_attain_their_bounds() -> None:
    """Every neuron picks one input, and two logits of opposite sign the same one: gradients add up to 2."""
    n, depth = 6, 5
    model = nn.Sequential(*[LinfDistance(n, n, bias=i == depth - 1) for i in range(depth)]).double()
    x = torch.randn(n, dtype=torch.float64) * 0.1
    h = x
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.copy_(h[None].repeat(n, 1))
            layer.weight[:, 0] = h[0] - 50
            if i == depth - 1:
                layer.weight[1, 0] = h[0] + 50
                layer.bias[1] = 60.0
            h = layer(h[None])[0]
    found = bounds(model, InputDomain((n,)), Norms(n, l1=2.0, l2=math.sqrt(2), linf=1.0))
    loss = F.cross_entropy(model(x[None]), torch.tensor([0]), reduction="sum")
    for (name, p), g in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert float(g.norm()) == pytest.approx(found[name], rel=1e-9), (name, p.shape)


def test_an_affine_network_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 2.0]))
        model[2].weight.copy_(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    found = bounds(model, InputDomain((2,), l2_radius=0.5), Norms(2, l1=2.0, l2=math.sqrt(2), linf=1.0))
    assert found["2.bias"] == pytest.approx(math.sqrt(2))
    centre, radius = math.sqrt(5), 4 * 0.5  # |b|, sigma |x|
    assert found["2.weight"] == pytest.approx(math.sqrt(2) * (centre + radius), rel=1e-6)
    assert found["0.bias"] == pytest.approx(2 * math.sqrt(2), rel=1e-6)  # sigma = 2
    assert found["0.weight"] == pytest.approx(2 * math.sqrt(2) * 0.5, rel=1e-6)


def test_a_residual_by_hand() -> None:
    """Cotangents add up where a value is used twice: 1 + 1 below the block, 1 into its branch."""
    model = nn.Sequential(LinfDistance(8, 8, bias=False), Residual(LinfDistance(8, 8, bias=False)))
    g = Norms(8, l1=1.0)
    assert bounds(model, InputDomain((8,)), g) == pytest.approx({"0.weight": 2.0, "1.branch.weight": 1.0})
    model = nn.Sequential(model[0], Residual(model[1].branch, mix=0.25))
    assert bounds(model, InputDomain((8,)), g) == pytest.approx({"0.weight": 1.0, "1.branch.weight": 0.25})


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = LinfDistance(4, 3, bias=False), LinfDistance(4, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.f(x), self.g(x)], dim=1)


def test_a_concatenation_by_hand() -> None:
    """Each piece sees at most the whole cotangent; below, the two pieces' cotangents add up to it twice."""
    model = nn.Sequential(LinfDistance(4, 4, bias=False), Fork())
    found = bounds(model, InputDomain((4,)), Norms(8, l1=3.0, l2=2.0))
    assert found == pytest.approx({"0.weight": 6.0, "1.f.weight": 2.0, "1.g.weight": 2.0})


class Shared(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.f = LinfDistance(4, 4, bias=False)
        self.g = LinfDistance(4, 4, bias=False) if tied else self.f
        self.g.weight = self.f.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.g(x))


@pytest.mark.parametrize("tied", [False, True])
def test_shared_parameters_add_up(tied: bool) -> None:
    found = bounds(Shared(tied), InputDomain((4,)), Norms(4, l1=2.0, l2=1.5))
    assert found == pytest.approx({"f.weight": 1.5 + 2.0})


def test_a_parameter_no_output_depends_on_has_no_sensitivity() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = LinfDistance(4, 4, bias=False), LinfDistance(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            self.g(x)
            return self.f(x)

    assert set(bounds(Unused(), InputDomain((4,)), Norms(4, l1=1.0))) == {"f.weight"}


def images() -> nn.Module:
    return nn.Sequential(
        LinearSpline(2, intervals=4, init="absolute_value"), AveragePool2d(3, 1), MaxMin(), Flatten(),
        Residual(NormalizedLinear(8, 8, ball="frobenius")), nn.Tanh(), SortLinear.top_k_mean(8, 5, k=3),
    )  # fmt: skip


def vectors() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), ReferenceShift(LinfDistance(6, 6), 0.5), BallClip(2.0), Residual(nn.Linear(6, 6), mix=0.4),
        MaxMin(), nn.Linear(6, 6), Clamp(-1.0, 0.7), Abs(), LinfDistance(6, 4, p=8), Scale(-3.0), Fork(),
    )  # fmt: skip


NETS: list[tuple[Callable[[], nn.Module], InputDomain]] = [
    (images, InputDomain((2, 4, 4), 0.0, 1.0, reference=0.5)),
    (images, InputDomain((2, 4, 4), -50.0, 50.0)),
    (vectors, InputDomain((5,), -1.0, 3.0, l2_radius=1.5)),
    (vectors, InputDomain((5,), l2_radius=100.0, reference=1.0)),
    (vectors, InputDomain((5,), 0.2, 0.2, reference=0.2)),
    (lambda: nn.Sequential(LinfDistance(5, 6), SortLinear.geometric(6, 4, rho=0.5)), InputDomain((5,), -2.0, 2.0)),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("net", range(len(NETS)))
def test_radius_and_magnitude_contain_every_activation(net: int, seed: int) -> None:
    make, domain = NETS[net]
    torch.manual_seed(seed)
    model = make().double()
    graph = trace(model)
    states = forward(graph, domain, input_like(model, domain))
    low, high = max(domain.lower, -200.0), min(domain.upper, 200.0)
    share = torch.rand(600, *domain.shape, dtype=torch.float64)
    share[:200] = share[:200].round()
    x = low + (high - low) * share
    away = x - domain.reference
    norm = torch.linalg.vector_norm(away.flatten(1), dim=1).view(-1, *[1] * len(domain.shape))
    x = domain.reference + away * (domain.l2_radius / norm).clamp_max(1)
    for name, value in graph.evaluate(x).items():
        state = states[name]
        assert state.shape == tuple(value.shape[1:])
        for v, bound in ((value - state.centre, state.radius), (value, state.magnitude)):
            for field, p in (("l1", 1), ("l2", 2), ("linf", math.inf)):
                found = float(torch.linalg.vector_norm(v.detach().flatten(1), p, dim=1).max())
                assert found <= getattr(bound, field) * (1 + 1e-9) + 1e-12, (name, field)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), NormalizedLinear(4, 3, ball="rows_l1"), ReferenceShift(NormalizedLinear(4, 3))]
)
def test_affine_layers_need_a_bounded_input(layer: nn.Module) -> None:
    model = nn.Sequential(LinfDistance(4, 4), layer)
    with pytest.raises(UnboundedInputError, match=r"node '_1': expected a finite bound for parameter '1\..*weight'"):
        bounds(model, InputDomain((4,)), Norms(3, l1=2.0))
    with pytest.raises(UnboundedInputError):
        bounds(model, InputDomain((4,), lower=0.0), Norms(3, l1=2.0))
    for bounded in (
        (model, InputDomain((4,), l2_radius=1.0)),
        (model, InputDomain((4,), -1.0, 1.0)),
        (nn.Sequential(Clamp(-1.0, 1.0), model), InputDomain((4,))),
        (nn.Sequential(BallClip(3.0), model), InputDomain((4,))),
        (nn.Sequential(model[0], nn.Tanh(), layer), InputDomain((4,))),
    ):
        assert all(math.isfinite(b) for b in bounds(*bounded, Norms(3, l1=2.0)).values())


def test_distance_splines_and_sorting_need_none() -> None:
    model = nn.Sequential(
        LinearSpline(4), LinfDistance(4, 6), MaxMin(), SortLinear.geometric(6, 5, rho=0.3), LinfDistance(5, 3, p=4)
    )
    assert all(math.isfinite(b) for b in bounds(model, InputDomain((4,)), Norms(3, l1=2.0)).values())


def test_weights_that_are_not_finite_give_no_sensitivity() -> None:
    model = nn.Sequential(LinfDistance(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    with pytest.raises(UnboundedInputError, match="node '_0'"):
        bounds(model, InputDomain((3,), 0.0, 1.0), Norms(3, l1=1.0))


def test_a_rule_that_forgets_a_parameter_is_refused() -> None:
    class Forgetful(LinfDistance):
        def param_sensitivity(self, x: Norms, g: Norms, shapes: Shapes) -> dict[str, float]:
            return {"weight": g.l2}

    with pytest.raises(BoundViolation, match=r"node 'model': expected.*\['bias', 'weight'\], got \['weight'\]"):
        bounds(Forgetful(3, 3), InputDomain((3,)), Norms(3, l1=1.0))


def test_cotangents_contain_the_gradients_of_every_activation() -> None:
    for make, domain in NETS:
        model = make().double()
        graph = trace(model)
        shapes = {name: s.shape for name, s in forward(graph, domain, input_like(model, domain)).items()}
        x = torch.rand(40, *domain.shape, dtype=torch.float64, requires_grad=True)
        values = graph.evaluate(x)
        out = values[graph.output]
        for g in (torch.randn_like(out), torch.ones_like(out), torch.eye(out.shape[1]).double()[torch.arange(40) % 3]):
            names = [n for n in values if values[n].requires_grad]
            grads = torch.autograd.grad(out, [values[n] for n in names], g, retain_graph=True, materialize_grads=True)
            norms = {k: torch.linalg.vector_norm(g, p, dim=1) for k, p in (("l1", 1), ("l2", 2), ("linf", math.inf))}
            for i in range(0, 40, 5):
                claim = backward(graph, shapes, Norms(g.shape[1], *(float(v[i]) for v in norms.values())))
                for name, grad in zip(names, grads, strict=True):
                    for field, p in (("l1", 1), ("l2", 2), ("linf", math.inf)):
                        found = float(torch.linalg.vector_norm(grad[i].flatten(), p))
                        assert found <= getattr(claim[name], field) * (1 + 1e-9), (name, field)


def test_input_like_follows_the_model() -> None:
    domain = InputDomain((2, 3), reference=0.25)
    assert input_like(nn.Sequential(LinfDistance(3, 2)).double(), domain).dtype == torch.float64
    assert input_like(nn.Sequential(Abs()), domain).dtype == torch.float32
    assert input_like(nn.Sequential(Abs()), domain).shape == (1, 2, 3)
    integers = nn.BatchNorm1d(3).double()  # has an integer buffer
    assert input_like(integers, domain).dtype == torch.float64
