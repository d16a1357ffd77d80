# SPDX-License-Identifier: Apache-2.0
"""Tracing: the graph computes what the model computes, and whatever has no rule is refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dplip.bounds import InputDomain, forward, input_like, trace
from dplip.errors import DplipError, MixesExamplesError, NoRuleError
from dplip.layers import LinfDistance, MaxMin, NormalizedLinear, Reshape, Residual, Scale


class Calls(nn.Module):
    """A model whose forward is a function of itself and ``x``."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in members.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def shared() -> nn.Module:
    torch.manual_seed(0)
    return Calls(lambda m, x: m.f(x) - m.f(m.f(x)), f=LinfDistance(4, 4))


LAWFUL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sequential": (lambda: nn.Sequential(LinfDistance(4, 6), nn.Sequential(MaxMin(), nn.Tanh())), (4,)),
    "single layer": (lambda: LinfDistance(4, 3), (4,)),
    "identity": (lambda: Calls(lambda m, x: x), (4,)),
    "residual": (lambda: Residual(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), (4,)),
    "convex residual": (lambda: Residual(NormalizedLinear(4, 4), mix=0.3), (4,)),
    "shared": (shared, (4,)),
    "concatenation": (lambda: Calls(lambda m, x: torch.cat([x, m.f(x), x], 1), f=nn.Linear(4, 2)), (4,)),
    "concatenation by name": (lambda: Calls(lambda m, x: torch.cat(tensors=(x, -x), dim=2)), (2, 3)),
    "reshape": (lambda: Calls(lambda m, x: x.reshape(x.shape[0], 2, -1)), (4,)),
    "view of size(0)": (lambda: Calls(lambda m, x: x.view(x.size(0), 4)), (2, 2)),
    "reshape to -1": (lambda: Calls(lambda m, x: torch.reshape(x, (-1, 2, 2))), (4,)),
    "view of size()[0]": (lambda: Calls(lambda m, x: x.view([x.size()[0], -1])), (2, 2)),
    "flatten": (lambda: Calls(lambda m, x: torch.flatten(x, 1) + x.flatten(1)), (2, 3)),
    "numbers": (lambda: Calls(lambda m, x: 3 - 2 * (x + 1) / 4 + x * -0.5 - 7), (4,)),
    "reversed": (lambda: Calls(lambda m, x: (1.5 - x) - (0.25 + x)), (4,)),
    "constants": (lambda: Calls(lambda m, x: m.c - (x + m.c) + (x - m.c), c=torch.linspace(-1, 1, 4)), (4,)),
    "constant with a batch axis": (lambda: Calls(lambda m, x: x + m.c, c=torch.ones(1, 4)), (4,)),
    "constant for the last axis": (lambda: Calls(lambda m, x: x - m.c, c=torch.ones(4)), (3, 4)),
    "frozen parameter": (
        lambda: Calls(lambda m, x: x + m.w, w=nn.Parameter(torch.ones(4), requires_grad=False)),
        (4,),
    ),
    "functions": (
        lambda: Calls(
            lambda m, x: torch.relu(x) + F.tanh(-x) + x.abs() + abs(x) + x.clamp(-1, 0.5) + torch.sigmoid(x)
            + torch.clip(x, min=0.1) + x.neg().contiguous()
        ),
        (4,),
    ),
    "methods": (lambda: Calls(lambda m, x: torch.add(x, x.sub(torch.mul(x, 2)).div(4)).tanh().relu().sigmoid()), (4,)),
    "unused branch": (lambda: Calls(lambda m, x: (m.f(x), x * 2)[1], f=nn.Linear(4, 2)), (4,)),
    "name clash": (lambda: Calls(lambda m, x: m.sub_neg(x) + (1 - x), sub_neg=Scale(5.0)), (4,)),
    "nested": (lambda: nn.Sequential(Calls(lambda m, x: x + m.g(x), g=Residual(Scale(0.5)))), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAWFUL)
def test_graph_computes_what_the_model_computes(name: str, dtype: torch.dtype) -> None:
    make, shape = LAWFUL[name]
    model = make().to(dtype)
    graph = trace(model)
    for batch in (1, 3):
        x = torch.randn(batch, *shape, dtype=dtype)
        y = graph.evaluate(x)[graph.output]
        tolerance = 1e-6 if dtype == torch.float32 else 1e-15
        torch.testing.assert_close(y, model(x), rtol=tolerance, atol=tolerance)
    forward(graph, InputDomain(shape, 0.0, 1.0), torch.zeros(1, *shape, dtype=dtype))


def test_parameters_are_named_as_in_the_model() -> None:
    graph = trace(nn.Sequential(nn.Linear(4, 4), nn.Sequential(LinfDistance(4, 3, bias=False))))
    assert [n.parameters for n in graph.nodes] == [
        {"weight": "0.weight", "bias": "0.bias"},
        {"weight": "1.0.weight"},
    ]
    assert [type(layer).__name__ for layer in graph.layers()] == ["Affine", "LinfDistance"]


def test_shared_and_tied_parameters_have_one_name() -> None:
    graph = trace(shared())
    assert [n.parameters["weight"] for n in graph.nodes if n.parameters] == ["f.weight"] * 3
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert [n.parameters["weight"] for n in trace(tied).nodes] == ["0.weight", "0.weight"]


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Inner(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(Scale(1.0), layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Custom(nn.Module):
    """A leaf in torch's own namespace, as far as fx can see."""

    __module__ = "torch.nn.modules.custom"

    def forward(self, x: Tensor) -> Tensor:
        return x


def counting(m: Any, x: Tensor) -> Tensor:
    m.seen += 1
    return x * 2


def averaging(m: Any, x: Tensor) -> Tensor:
    m.mean = 0.9 * m.mean + 0.1 * x.mean(0)
    return x - m.mean


def averaging_in_place(m: Any, x: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(0.1 * x.mean(0))
    return x - m.mean


def in_place_sum(m: Any, x: Tensor) -> Tensor:
    y = x
    y += torch.abs(x)
    return y + x


def in_place_product(m: Any, x: Tensor) -> Tensor:
    y = m.f(x)
    z = y + x
    y *= 2
    return y + z


def made_inside(m: Any, x: Tensor) -> Tensor:
    return nn.Linear(4, 4)(x)


MIXES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm1d(4), "'model' \\(BatchNorm1d\\)"),
    "nested batch norm": (lambda: Inner(nn.BatchNorm1d(4)), "'block.1' \\(BatchNorm1d\\) mixes.*ReferenceShift"),
    "lazy batch norm": (lambda: Inner(nn.LazyBatchNorm1d()), "'block.1' \\(LazyBatchNorm1d\\)"),
    "batch norm on images": (lambda: Inner(nn.BatchNorm2d(4)), "BatchNorm2d"),
    "batch mean": (lambda: Calls(lambda m, x: x - x.mean(0)), "node 'mean'.*batch axis"),
    "batch mean by name": (lambda: Calls(lambda m, x: x - x.mean(dim=0)), "node 'mean'"),
    "kept batch mean": (lambda: Calls(lambda m, x: x - torch.mean(x, dim=(0, 1), keepdim=True)), "node 'mean'"),
    "whole mean": (lambda: Calls(lambda m, x: x - x.mean()), "node 'mean'"),
    "batch maximum": (lambda: Calls(lambda m, x: x - x.amax(0)), "node 'amax'"),
    "softmax over the batch": (lambda: Calls(lambda m, x: torch.softmax(x, 0)), "node 'softmax'"),
    "concatenation along the batch": (lambda: Calls(lambda m, x: torch.cat([x, x])), "node 'cat'.*axis 0"),
    "concatenation along axis 0": (lambda: Calls(lambda m, x: torch.cat([x, -x], dim=0)), "node 'cat'.*axis 0"),
    "concatenation from behind": (lambda: Calls(lambda m, x: torch.cat([x, x], -2)), "node 'cat'.*axis -2"),
    "view of all": (lambda: Calls(lambda m, x: x.view(-1)), "node 'view' must keep the batch axis"),
    "batch folded into rows": (lambda: Calls(lambda m, x: x.view(-1, 2)), "node 'view'.*batch axis"),
    "batch moved": (lambda: Calls(lambda m, x: x.reshape(4, -1)), "node 'reshape' must keep the batch axis"),
    "batch size twice": (lambda: Calls(lambda m, x: x.view(x.shape[0], x.shape[0])), "node 'view'"),
    "every pair of examples": (lambda: Calls(lambda m, x: x.reshape(x.shape[0], 1, 4) + x), "node 'add'.*broadcasting"),
    "noise for every place": (lambda: Calls(lambda m, x: x + m.c, c=torch.randn(3, 4)), "place in the batch"),
    "counter": (lambda: Calls(counting, seen=torch.zeros(())), "writes to buffers \\['seen'\\]"),
    "running mean": (lambda: Calls(averaging, mean=torch.zeros(4)), "buffers \\['mean'\\]"),
    "running mean in place": (lambda: Calls(averaging_in_place, mean=torch.zeros(4)), "node 'mean'"),
}

UNKNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: Inner(nn.Dropout()), "'block.1' \\(Dropout\\) has no rule"),
    "layer norm": (lambda: Inner(nn.LayerNorm(4)), "'block.1' \\(LayerNorm\\)"),
    "group norm": (lambda: Inner(nn.GroupNorm(1, 4)), "'block.1' \\(GroupNorm\\)"),
    "foreign leaf": (lambda: nn.Sequential(Custom()), "'0' \\(Custom\\)"),
    "mean over features": (
        lambda: Calls(lambda m, x: x - x.mean(1, keepdim=True)),
        "node 'mean' \\(mean\\) has no rule",
    ),
    "trainable parameter": (
        lambda: Calls(lambda m, x: x @ m.w, w=nn.Parameter(torch.ones(4, 4))),
        "'w' is a trainable parameter",
    ),
    "functional linear": (
        lambda: Calls(lambda m, x: F.linear(x, m.f.weight), f=nn.Linear(4, 4)),
        "'f.weight' is a trainable",
    ),
    "control flow": (lambda: Calls(lambda m, x: x if x.sum() > 0 else -x), "traceable by torch.fx.*control flow"),
    "loop over the batch": (lambda: Calls(lambda m, x: torch.stack([r for r in x])), "traceable"),
    "conversion": (lambda: Calls(lambda m, x: x * float(x.sum())), "traceable"),
    "layer made in forward": (lambda: Calls(made_inside), "traceable"),
    "two inputs": (TwoInputs, "one input, got \\['x', 'y'\\]"),
    "two outputs": (Pair, "return one tensor"),
    "constant output": (lambda: Calls(lambda m, x: m.c, c=torch.ones(1, 4)), "return one tensor"),
    "in-place sum": (lambda: Calls(in_place_sum), "in-place operation"),
    "in-place product": (lambda: Calls(in_place_product, f=Scale(1.0)), "in-place operation"),
    "in-place method": (lambda: Calls(lambda m, x: x.add_(1)), "node 'add_'"),
    "in-place relu": (lambda: nn.Sequential(nn.ReLU(inplace=True)), "relu: expected inplace=False"),
    "in-place functional relu": (lambda: Calls(lambda m, x: F.relu(x, inplace=True)), "inplace=False"),
    "in-place hardtanh": (lambda: nn.Sequential(nn.Hardtanh(inplace=True)), "nn.Hardtanh: expected inplace=False"),
    "product of activations": (lambda: Calls(lambda m, x: x * x), "node 'mul' \\(mul\\)"),
    "quotient": (lambda: Calls(lambda m, x: 1 / x), "node 'truediv'"),
    "division by zero": (lambda: Calls(lambda m, x: x / 0), "node 'truediv' divides by zero"),
    "division by the batch size": (lambda: Calls(lambda m, x: x / x.shape[0]), "node 'truediv'"),
    "batch size added": (lambda: Calls(lambda m, x: x + x.shape[0]), "node 'add"),
    "batch size in a clamp": (lambda: Calls(lambda m, x: x.clamp(0, x.shape[0])), "node 'clamp'"),
    "bound that depends on x": (lambda: Calls(lambda m, x: torch.clamp(x, max=m.f(x)), f=Scale(1.0)), "node 'clamp'"),
    "bound in a buffer": (lambda: Calls(lambda m, x: torch.clamp(x, min=m.c), c=torch.zeros(4)), "node 'clamp'"),
    "scaled addition": (lambda: Calls(lambda m, x: torch.add(x, x, alpha=3)), "node 'add'"),
    "constants only": (
        lambda: Calls(lambda m, x: x + (m.w + 1), w=nn.Parameter(torch.ones(4), requires_grad=False)),
        "node 'add'",
    ),
    "infinite constant": (lambda: Calls(lambda m, x: x + float("inf")), "node 'add'.*not finite"),
    "row of the batch": (lambda: Calls(lambda m, x: x - x[0]), "node 'getitem'"),
    "transpose": (lambda: Calls(lambda m, x: x.t()), "node 't'"),
    "flatten with the batch": (lambda: Calls(lambda m, x: x.flatten()), "expected start_dim=1"),
    "feature size": (lambda: Calls(lambda m, x: x.reshape(-1, x.shape[1])), "reads size 1"),
    "concatenation with a constant": (
        lambda: Calls(lambda m, x: torch.cat([x, m.c], 1), c=torch.ones(1, 2)),
        "node 'cat'",
    ),
    "broadcast sum": (
        lambda: Calls(lambda m, x: x.view(x.shape[0], 4, 1) + x.view(x.shape[0], 1, 4)),
        "node 'add'.*broadcasting",
    ),
    "constant that widens": (
        lambda: Calls(lambda m, x: x.view(x.shape[0], 4, 1) + m.c, c=torch.ones(9)),
        "node 'add'.*Shift",
    ),
    "constant that moves the batch": (lambda: Calls(lambda m, x: x + m.c, c=torch.ones(1, 1, 4)), "node 'add'.*Shift"),
    "layer of another width": (
        lambda: nn.Sequential(LinfDistance(5, 3)),
        "node '_0'.*LinfDistance|node '_0'.*order_statistic",
    ),
    "layer called with two arguments": (lambda: Calls(lambda m, x: m.f(x, x), f=Scale(1.0)), "one tensor argument"),
    "layer called by name": (lambda: Calls(lambda m, x: m.f(x=x), f=Scale(1.0)), "one tensor argument"),
}


def analyse(model: nn.Module) -> None:
    domain = InputDomain((4,), 0.0, 1.0)
    forward(trace(model), domain, input_like(model, domain))


@pytest.mark.parametrize("name", MIXES)
def test_models_that_mix_examples_are_refused(name: str) -> None:
    make, text = MIXES[name]
    with pytest.raises(MixesExamplesError, match=text):
        analyse(make())


@pytest.mark.parametrize("name", UNKNOWN)
def test_models_without_a_rule_are_refused(name: str) -> None:
    make, text = UNKNOWN[name]
    with pytest.raises(NoRuleError, match=text):
        analyse(make())


@pytest.mark.parametrize("name", [*MIXES, *UNKNOWN])
def test_messages_are_one_line_with_a_remedy(name: str) -> None:
    make, _ = (MIXES | UNKNOWN)[name]
    with pytest.raises(DplipError) as caught:
        analyse(make())
    text = str(caught.value)
    assert "\n" not in text and ";" in text


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Calls(averaging_in_place, mean=torch.ones(4))
    buffer = model.mean
    with pytest.raises(MixesExamplesError):
        trace(model)
    assert model.mean is buffer and bool((buffer == 1).all())
    model = Calls(averaging, mean=torch.ones(4))
    buffer = model.mean
    with pytest.raises(MixesExamplesError):
        trace(model)
    assert model.mean is buffer and bool((buffer == 1).all())


def test_a_reshape_that_loses_entries_is_refused() -> None:
    with pytest.raises(MixesExamplesError, match="node '_0'"):
        analyse(nn.Sequential(Reshape(3)))
